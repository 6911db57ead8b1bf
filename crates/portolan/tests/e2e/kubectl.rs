//! Each kubectl command that people use, with the installed kubectl.

use portolan_testkit::{eventually, run};

use crate::{LIMIT, up};

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: talker, labels: {app: talker}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: portolan.dev/toolbox
    command: [sh, -c, 'echo hello; echo again; sleep 1000']
    env: [{name: GREETING, value: bonjour}]
";

#[test]
fn objects_are_made_read_changed_and_removed() {
    let c = up("kubectl");
    c.kubectl("create namespace work").ok();
    c.kubectl("config set-context --current --namespace=work").ok();
    c.kubectl("create configmap settings --from-literal=color=blue").ok();
    assert_eq!(c.kubectl("get configmap settings -o jsonpath={.data.color}").ok(), "blue");
    c.kubectl("label configmap settings tier=front").ok();
    c.kubectl("annotate configmap settings note=x").ok();
    c.kubectl("get configmap -l tier=front").has("settings").unwrap();
    assert_eq!(c.kubectl("get configmap -l tier=back -o name").ok(), "");
    c.kubectl("get configmap --field-selector=metadata.name=settings -o name").has("settings").unwrap();
    c.kubectl_args(["patch", "configmap", "settings", "--type=merge", "-p", r#"{"data":{"size":"1"}}"#]).ok();
    c.kubectl_args([
        "patch",
        "configmap",
        "settings",
        "--type=json",
        "-p",
        r#"[{"op":"remove","path":"/data/color"}]"#,
    ])
    .ok();
    assert_eq!(c.kubectl("get configmap settings -o jsonpath={.data}").ok(), r#"{"size":"1"}"#);
    c.kubectl("get configmap settings -o yaml").has("size: \"1\"").unwrap();

    let editor = c.kubeconfig.with_file_name("editor");
    std::fs::write(&editor, "#!/bin/sh\nsed -i 's/size: \"1\"/size: \"2\"/' \"$1\"\n").unwrap();
    std::fs::set_permissions(&editor, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let mut edit = c.kubectl_command();
    run(edit.args(["edit", "configmap", "settings"]).env("KUBE_EDITOR", &editor)).ok();
    assert_eq!(c.kubectl("get configmap settings -o jsonpath={.data.size}").ok(), "2");

    let manifest = "{apiVersion: v1, kind: ConfigMap, metadata: {name: applied}, data: {a: '1'}}";
    c.apply(manifest).has("created").unwrap();
    c.apply(manifest).has("unchanged").unwrap();
    c.apply(&manifest.replace("'1'", "'2'")).has("configured").unwrap();
    let diff = c.kubectl_stdin(&["diff", "-f", "-"], &manifest.replace("'1'", "'3'"));
    assert_eq!(diff.code, Some(1), "{diff}");
    assert!(diff.stdout.contains("+  a: \"3\""), "{diff}");
    c.kubectl_stdin(
        &["apply", "--server-side", "--field-manager=one", "-f", "-"],
        &manifest.replace("applied", "sided"),
    )
    .ok();
    let conflict = c
        .kubectl_stdin(
            &["apply", "--server-side", "--field-manager=two", "-f", "-"],
            &manifest.replace("applied", "sided").replace("'1'", "'9'"),
        )
        .failed();
    assert!(conflict.contains("conflict with \"one\""), "{conflict}");

    c.kubectl("api-resources").has("endpointslices").unwrap();
    c.kubectl("api-versions").has("discovery.k8s.io/v1").unwrap();
    c.kubectl("explain deployment.spec.strategy").has("rollingUpdate").unwrap();
    c.kubectl("explain service.spec.clusterIP").has("clusterIP").unwrap();
    c.kubectl("version -o json").has("\"gitVersion\": \"v1.36").unwrap();
    c.kubectl("get all -A").has("service/kubernetes").unwrap();
    c.kubectl("delete configmap settings").has("deleted").unwrap();
    assert!(c.kubectl("get configmap settings").failed().contains("configmaps \"settings\" not found"));
    c.kubectl("delete namespace work --timeout=30s").ok();
    assert!(c.kubectl("get namespace work").failed().contains("NotFound"));
}

#[test]
fn pods_run_are_entered_and_read() {
    let c = up("pods");
    c.apply(POD).ok();
    c.kubectl("wait pod/talker --for=condition=Ready --timeout=60s").ok();
    assert_eq!(c.kubectl("logs talker").ok(), "hello\nagain\n");
    assert_eq!(c.kubectl("logs talker --tail=1").ok(), "again\n");
    assert_eq!(c.kubectl_args(["exec", "talker", "--", "sh", "-c", "echo $GREETING"]).ok(), "bonjour\n");
    let failed = c.kubectl_args(["exec", "talker", "--", "sh", "-c", "exit 7"]);
    assert_eq!(failed.code, Some(7), "{failed}");
    assert_eq!(c.kubectl_stdin(&["exec", "-i", "talker", "--", "cat"], "through").ok(), "through");
    c.kubectl("describe pod talker").has("Started").unwrap();
    c.kubectl("get pod talker -o wide").has("10.244.").unwrap();
    c.kubectl("get events --sort-by=.lastTimestamp").has("Pulled").unwrap();
    c.kubectl("run echo --image=portolan.dev/echo --port=8080 --expose").has("service/echo created").unwrap();
    c.kubectl("wait pod/echo --for=condition=Ready --timeout=60s").ok();
    eventually("the exposed Service answers", LIMIT, || {
        c.kubectl_args(["exec", "talker", "--", "curl", "-sS", "--max-time", "2", "http://echo:8080/"])
            .has("\"pod\":\"echo\"")
    });
    c.kubectl("delete pod talker --timeout=30s").ok();
}

/// Ends a process when dropped.
struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Exec, attach, cp and port-forward over WebSocket and over SPDY. Newer kubectl can do both and has a switch for each; kubectl
/// before 1.29 ignores the switch and does SPDY twice.
#[test]
fn streams_work_over_either_transport() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    let c = up("streams");
    c.apply(POD).ok();
    c.apply(
        "
apiVersion: v1
kind: Pod
metadata: {name: reader}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: portolan.dev/toolbox
    stdin: true
    command: [sh, -c, 'while read line; do echo got $line; done']
",
    )
    .ok();
    c.kubectl("run echo --image=portolan.dev/echo --port=8080").ok();
    c.kubectl("wait pod/talker pod/reader pod/echo --for=condition=Ready --timeout=60s").ok();
    let folder = c.kubeconfig.parent().unwrap();
    let data: Vec<u8> = (0u32..500_000).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    std::fs::write(folder.join("sent"), &data).unwrap();

    for websockets in ["true", "false"] {
        let kubectl = || {
            let mut command = c.kubectl_command();
            command.current_dir(folder);
            command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets);
            command.env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websockets);
            command
        };
        let failed = run(kubectl().args(["exec", "talker", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]));
        assert_eq!((failed.code, failed.stdout.as_str()), (Some(7), "out\n"), "{failed}");
        assert!(failed.stderr.contains("err\n"), "{failed}");

        run(kubectl().args(["cp", "sent", "talker:/tmp/there"])).ok();
        run(kubectl().args(["cp", "talker:/tmp/there", "back"])).ok();
        assert!(std::fs::read(folder.join("back")).unwrap() == data, "cp changed the file (WebSocket: {websockets})");
        std::fs::remove_file(folder.join("back")).unwrap();

        let mut attached = Running(
            kubectl().args(["attach", "-i", "reader"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap(),
        );
        std::io::Write::write_all(attached.0.stdin.as_mut().unwrap(), b"hello\n").unwrap();
        let output = BufReader::new(attached.0.stdout.take().unwrap());
        assert!(
            output.lines().map_while(Result::ok).any(|line| line == "got hello"),
            "attach (WebSocket: {websockets})"
        );

        let mut forward =
            Running(kubectl().args(["port-forward", "pod/echo", ":8080"]).stdout(Stdio::piped()).spawn().unwrap());
        let mut lines = BufReader::new(forward.0.stdout.take().unwrap()).lines();
        let first = lines.next().expect("port-forward says where it listens").unwrap();
        let address = first.split_whitespace().find(|word| word.starts_with("127.0.0.1:")).expect(&first).to_string();
        let curl = |path: &str| {
            run(Command::new("curl").args(["-sS", "--max-time", "20", &format!("http://{address}{path}")])).ok()
        };
        assert!(curl("/").contains("\"pod\":\"echo\""), "WebSocket: {websockets}");
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..4).map(|_| scope.spawn(|| curl("/bytes?n=1000000").len())).collect();
            for one in all {
                assert_eq!(one.join().unwrap(), 1_000_000, "WebSocket: {websockets}");
            }
        });
    }
    let once = c.kubectl_stdin(
        &[
            "run",
            "once",
            "-i",
            "--rm",
            "--restart=Never",
            "--image=portolan.dev/toolbox",
            "--command",
            "--",
            "wc",
            "-c",
        ],
        "twelve bytes",
    );
    assert!(once.code == Some(0) && once.stdout.contains("12"), "{once}");
}

#[test]
fn deployments_roll_and_scale() {
    let c = up("rollout");
    c.kubectl("create deployment web --image=portolan.dev/echo --replicas=3").ok();
    c.kubectl("rollout status deployment/web --timeout=60s").has("successfully rolled out").unwrap();
    c.kubectl("expose deployment web --port=80 --target-port=8080").ok();
    eventually("three endpoints", LIMIT, || {
        let addresses = c.kubectl("get endpoints web -o jsonpath={.subsets[*].addresses[*].ip}").ok();
        if addresses.split_whitespace().count() == 3 { Ok(()) } else { Err(addresses) }
    });
    c.kubectl("scale deployment web --replicas=1").ok();
    eventually("one pod is left", LIMIT, || {
        let replicas = c.kubectl("get deployment web -o jsonpath={.status.replicas}").ok();
        if replicas == "1" { Ok(()) } else { Err(replicas) }
    });
    c.kubectl("rollout restart deployment/web").ok();
    c.kubectl("rollout status deployment/web --timeout=60s").ok();
    c.kubectl("rollout history deployment/web").has("2").unwrap();
    c.kubectl("describe service web").has("Endpoints:").unwrap();
    c.kubectl("describe deployment web").has("ScalingReplicaSet").unwrap();
    c.kubectl("delete deployment web").ok();
    eventually("its pods go", LIMIT, || {
        let pods = c.kubectl("get pods -l app=web -o name").ok();
        if pods.is_empty() { Ok(()) } else { Err(pods) }
    });
}
