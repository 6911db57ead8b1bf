//! The lab of `conformance/golden/README.md`: a LAN with three nodes, their pods, two clients and a gateway, each in a network
//! namespace that has no name and so cannot outlive the test.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use portolan_linux::{Netns, set_sysctl};
use portolan_plan::world::{LocalDetection, NodeView};

pub const NODES: [&str; 3] = ["n1", "n2", "n3"];
pub const PODS: [&str; 6] = ["p1a", "p1b", "p2a", "p2b", "p3a", "p3b"];

/// The address that a name of the recording stands for.
pub fn address(name: &str) -> Option<IpAddr> {
    let (name, v6) = match name.strip_suffix(".6") {
        Some(name) => (name, true),
        None => (name, false),
    };
    let text = |v4: String, six: String| (if v6 { six } else { v4 }).parse().ok();
    let number = |s: &str| s.parse::<u8>().ok();
    if let Some(node) = name.strip_suffix(".gw") {
        let k = number(node.strip_prefix('n')?)?;
        return text(format!("10.244.{k}.1"), format!("fd00:10:244:{k}::1"));
    }
    match name {
        "gw" => return text("192.168.50.254".into(), "fd00:50::254".into()),
        "localhost" => return text("127.0.0.1".into(), "::1".into()),
        "U" => return text("10.96.99.99".into(), "fd00:10:96::9:99".into()),
        _ => {}
    }
    let rest = &name[1..];
    match &name[..1] {
        "n" => number(rest).and_then(|k| text(format!("192.168.50.{}", 10 + k), format!("fd00:50::{}", 10 + k))),
        "x" => number(rest)
            .and_then(|k| text(format!("192.168.50.{}", 100 + k), format!("fd00:50::{}", 100 + u16::from(k)))),
        "C" => number(rest).and_then(|k| text(format!("10.96.10.{k}"), format!("fd00:10:96::a:{k}"))),
        "L" => number(rest).and_then(|k| text(format!("203.0.113.{k}"), format!("fd00:113::{k}"))),
        "E" => number(rest).and_then(|k| text(format!("198.51.100.{k}"), format!("fd00:100::{k}"))),
        "p" => {
            let k = number(&rest[..1])?;
            let last = match &rest[1..] {
                "a" => "10",
                "b" => "11",
                "dead" => "99",
                _ => return None,
            };
            text(format!("10.244.{k}.{last}"), format!("fd00:10:244:{k}::{last}"))
        }
        _ => None,
    }
}

/// The network that a name of the recording stands for.
pub fn network(name: &str) -> Option<&'static str> {
    Some(match name {
        "pods" => "10.244.0.0/16",
        "lan" => "192.168.50.0/24",
        "all" => "0.0.0.0/0",
        "pods.6" => "fd00:10:244::/48",
        "lan.6" => "fd00:50::/64",
        "all.6" => "::/0",
        _ => return None,
    })
}

/// The node as its Node object describes it.
pub fn node_view(name: &str) -> NodeView {
    NodeView {
        name: name.into(),
        zone: Some(if name == "n2" { "b" } else { "a" }.into()),
        node_port_addresses: vec![address(name).unwrap(), address(&format!("{name}.6")).unwrap()],
        local_addresses: ["", ".6", ".gw", ".gw.6"].iter().map(|s| address(&format!("{name}{s}")).unwrap()).collect(),
        local_detection: LocalDetection::InterfacePrefix("vp".into()),
        masquerade_all: false,
    }
}

/// The node when it recognises pods by their networks.
pub fn node_view_by_network(name: &str) -> NodeView {
    let networks = ["pods", "pods.6"].iter().map(|n| network(n).unwrap().parse().unwrap()).collect();
    NodeView { local_detection: LocalDetection::Networks(networks), ..node_view(name) }
}

pub struct Lab {
    pub spaces: BTreeMap<String, Netns>,
}

impl Lab {
    pub fn build() -> Lab {
        let names = NODES.iter().chain(&PODS).chain(&["x1", "x2", "gw", "lan"]);
        let spaces: BTreeMap<String, Netns> = names.map(|n| ((*n).to_owned(), unnamed_namespace())).collect();
        let lab = Lab { spaces };
        for (name, space) in &lab.spaces {
            let router = name.starts_with('n');
            for (key, value) in [
                ("net/ipv4/ip_forward", if router { "1" } else { "0" }),
                ("net/ipv6/conf/all/forwarding", if router { "1" } else { "0" }),
                ("net/ipv6/conf/all/disable_ipv6", "0"),
                ("net/ipv6/conf/all/accept_dad", "0"),
                ("net/ipv6/conf/default/accept_dad", "0"),
                ("net/ipv4/conf/all/rp_filter", "0"),
                ("net/ipv4/conf/default/rp_filter", "0"),
                ("net/ipv4/conf/all/send_redirects", "0"),
                ("net/ipv4/conf/default/send_redirects", "0"),
                ("net/ipv4/conf/all/accept_redirects", "0"),
                ("net/ipv4/conf/default/accept_redirects", "0"),
                // Every refusal counts here; the kernel's usual limits are for hostile networks.
                ("net/ipv4/icmp_ratelimit", "0"),
                ("net/ipv6/icmp/ratelimit", "0"),
            ] {
                set_sysctl(space, key, value).unwrap_or_else(|e| panic!("{name}: {key}: {e}"));
            }
        }
        let fd = |name: &str| format!("/proc/{}/fd/{}", std::process::id(), lab.spaces[name].as_raw_fd());

        let mut lan = "link add lan0 type bridge\nlink set lan0 up\nlink set lo up\n".to_owned();
        for name in NODES.iter().chain(&["x1", "x2", "gw"]) {
            let _ = write!(
                lan,
                "link add l{name} type veth peer name eth0 netns {}\nlink set l{name} master lan0 up\n",
                fd(name)
            );
        }
        lab.ip("lan", &lan);
        for name in NODES.iter().chain(&["x1", "x2", "gw"]) {
            let mut script = format!(
                "link set lo up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\nlink set eth0 up\n",
                address(name).unwrap(),
                address(&format!("{name}.6")).unwrap()
            );
            for k in 1..=3 {
                let node = format!("n{k}");
                if *name != node {
                    let _ = write!(
                        script,
                        "route add 10.244.{k}.0/24 via {}\nroute add fd00:10:244:{k}::/64 via {}\n",
                        address(&node).unwrap(),
                        address(&format!("{node}.6")).unwrap()
                    );
                }
                if name.starts_with('x') {
                    let _ = write!(
                        script,
                        "rule add fwmark {k} table 10{k}\n-6 rule add fwmark {k} table 10{k}\n\
                         route add default via {} table 10{k}\n-6 route add default via {} table 10{k}\n",
                        address(&node).unwrap(),
                        address(&format!("{node}.6")).unwrap()
                    );
                }
            }
            if *name != "gw" {
                let _ = write!(
                    script,
                    "route add default via {}\n-6 route add default via {}\n",
                    address("gw").unwrap(),
                    address("gw.6").unwrap()
                );
            }
            if let Some(k) = name.strip_prefix('n') {
                let _ = write!(
                    script,
                    "route add unreachable 10.244.{k}.0/24\n-6 route add unreachable fd00:10:244:{k}::/64\n"
                );
                for pod in PODS.iter().filter(|p| p[1..].starts_with(k)) {
                    let (gw4, gw6) =
                        (address(&format!("{name}.gw")).unwrap(), address(&format!("{name}.gw.6")).unwrap());
                    let (pod4, pod6) = (address(pod).unwrap(), address(&format!("{pod}.6")).unwrap());
                    let _ = write!(
                        script,
                        "link add v{pod} type veth peer name eth0 netns {}\n\
                         addr add {gw4}/32 dev v{pod}\naddr add {gw6}/128 dev v{pod} nodad\nlink set v{pod} up\n\
                         route add {pod4}/32 dev v{pod}\n-6 route add {pod6}/128 dev v{pod}\n",
                        fd(pod)
                    );
                }
            }
            lab.ip(name, &script);
        }
        for pod in PODS {
            let node = format!("n{}", &pod[1..2]);
            let (gw4, gw6) = (address(&format!("{node}.gw")).unwrap(), address(&format!("{node}.gw.6")).unwrap());
            lab.ip(
                pod,
                &format!(
                    "link set lo up\naddr add {}/32 dev eth0\naddr add {}/128 dev eth0 nodad\nlink set eth0 up\n\
                     route add default via {gw4} dev eth0 onlink\n-6 route add {gw6}/128 dev eth0\n-6 route add default via {gw6} dev eth0 onlink\n",
                    address(pod).unwrap(),
                    address(&format!("{pod}.6")).unwrap()
                ),
            );
        }
        // The gateway plays the world: whatever is sent to these networks reaches its echo server.
        lab.run(
            "gw",
            "nft",
            &["-f", "-"],
            "table ip world {
               chain prerouting {
                 type nat hook prerouting priority dstnat
                 ip daddr { 203.0.113.0/24, 198.51.100.0/24, 10.96.0.0/12 } meta l4proto { tcp, udp } redirect to :8080
               }
             }
             table ip6 world {
               chain prerouting {
                 type nat hook prerouting priority dstnat
                 ip6 daddr { fd00:113::/64, fd00:100::/64, fd00:10:96::/108 } meta l4proto { tcp, udp } redirect to :8080
               }
             }
",
        );
        lab
    }

    /// Runs `ip -batch` in a namespace; lines that begin with `-6` go last, with that option.
    pub fn ip(&self, space: &str, script: &str) {
        let (six, rest): (Vec<&str>, Vec<&str>) = script.lines().partition(|l| l.starts_with("-6 "));
        self.run(space, "ip", &["-batch", "-"], &rest.join("\n"));
        let six: Vec<&str> = six.iter().map(|l| &l[3..]).collect();
        self.run(space, "ip", &["-6", "-batch", "-"], &six.join("\n"));
    }

    /// Runs a program in a namespace with some input.
    pub fn run(&self, space: &str, program: &str, args: &[&str], input: &str) -> String {
        let output = self.spaces[space]
            .run(|| {
                let mut child = Command::new(program)
                    .args(args)
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
                    .unwrap_or_else(|e| panic!("{program}: {e}"));
                child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
                child.wait_with_output().unwrap()
            })
            .unwrap();
        assert!(output.status.success(), "{program} in {space}: {}\n{input}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// A namespace that is held by a descriptor only.
pub fn unnamed_namespace() -> Netns {
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("needs root");
        Netns::open("/proc/thread-self/ns/net").unwrap()
    })
    .join()
    .unwrap()
}
