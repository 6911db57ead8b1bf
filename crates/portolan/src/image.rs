//! `portolan image`: the image store of a standalone cluster.

use std::path::PathBuf;

use anyhow::{Context, Result};
use portolan_node::{ImageStore, image_users};

use crate::args;
use crate::state::Paths;

/// Runs the command.
pub fn run(command: args::Image) -> Result<()> {
    match command {
        args::Image::Import(args) => {
            let store = open(&args.named, args.data_dir)?;
            let imported =
                store.import(&args.file).with_context(|| format!("cannot import {}", args.file.display()))?;
            for reference in imported {
                println!("imported {reference}");
            }
        }
        args::Image::List(args) => {
            for image in open(&args.named, args.data_dir)?.list()? {
                let size_mib = image.size_bytes / (1024 * 1024);
                for reference in &image.references {
                    println!("{reference}  {}  {size_mib} MiB", image.id);
                }
                // Its names were given to a newer image.
                if image.references.is_empty() {
                    println!("<none>  {}  {size_mib} MiB", image.id);
                }
            }
        }
        args::Image::Remove(args) => {
            let store = open(&args.named, args.data_dir)?;
            let run = Paths::new(&args.named.name).run;
            let users = || image_users(&run);
            let removed = if args.unused { store.remove_unused(users) } else { store.remove(&args.images, users) };
            for name in removed? {
                println!("removed {name}");
            }
        }
    }
    Ok(())
}

fn open(named: &args::Named, data_dir: Option<PathBuf>) -> Result<ImageStore> {
    let paths = Paths::new(&named.name);
    let running = paths.read_state()?.map(|state| state.data_dir);
    let data = data_dir.or(running).unwrap_or_else(|| paths.default_data());
    let dir = data.join("images");
    ImageStore::open(&dir).with_context(|| format!("cannot open the image store {}", dir.display()))
}
