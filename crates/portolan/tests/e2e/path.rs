//! The whole path, as the demo shows it.

use std::path::PathBuf;
use std::process::Command;

use portolan_testkit::run;

use crate::{BINARY, up};

#[test]
fn the_demo_shows_every_hop_twice() {
    let cluster = up("demo");
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/demo.sh");
    for time in ["first", "second"] {
        let ran = run(Command::new(&script).args([BINARY, &cluster.name]).env("TERM", "dumb"));
        assert_eq!(ran.code, Some(0), "{time} run: {ran}");
    }
}
