//! The program that the crate's tests put into the built-in images: `agent echo [--port N]... [--tcp-port N]... [--udp-port N]...`.
//!
//! The real one is the `portolan` binary; this one keeps the crate testable by itself.

use portolan_node::echo::{EchoConfig, Identity, run};

fn main() -> std::io::Result<()> {
    let mut args = std::env::args().skip(1);
    let command = args.next().unwrap_or_default();
    if command != "echo" {
        return Err(std::io::Error::other(format!("unknown command {command:?}")));
    }
    let mut config = EchoConfig { http_ports: Vec::new(), identity: Identity::from_env(), ..EchoConfig::default() };
    while let Some(flag) = args.next() {
        let value = args.next().unwrap_or_default();
        let port = value.parse().map_err(|_| std::io::Error::other(format!("bad value for {flag}: {value:?}")))?;
        match flag.as_str() {
            "--port" => config.http_ports.push(port),
            "--tcp-port" => config.tcp_ports.push(port),
            "--udp-port" => config.udp_ports.push(port),
            _ => return Err(std::io::Error::other(format!("unknown flag {flag}"))),
        }
    }
    if config.http_ports.is_empty() {
        config.http_ports.push(8080);
    }
    println!("listening");
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run(config))
}
