#!/usr/bin/env python3
"""What a standalone cluster costs: time to ready, time to a first answer, memory and CPU at rest, time from endpoint to kernel rule.

Prints a Markdown table. Each time is the median of several runs of the whole, from outside, with the tools that a user has.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

BINARY = os.path.abspath(sys.argv[1])
NAME = f"bench-{os.getpid()}"
RUNS = 5

APP = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: NAME}
spec:
  replicas: 3
  selector: {matchLabels: {app: NAME}}
  template:
    metadata: {labels: {app: NAME}}
    spec:
      containers:
      - name: echo
        image: portolan.dev/echo
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: NAME}
spec:
  type: NodePort
  selector: {app: NAME}
  ports: [{port: 80, targetPort: 8080}]
"""


def portolan(command, *args, check=True):
    return subprocess.run([BINARY, command, "--name", NAME, *args], capture_output=True, text=True, check=check).stdout


def kubectl(*args, stdin=None, check=True):
    # A document marker says that flow style is YAML, which kubectl takes for JSON otherwise.
    stdin = stdin and "---\n" + stdin
    return subprocess.run(["kubectl", *args], input=stdin, capture_output=True, text=True, check=check).stdout


def up():
    start = time.monotonic()
    portolan("up", "--detach", "--nodes", "2", "--api-port", "0", "--http-port", "0", "--https-port", "0")
    took = time.monotonic() - start
    os.environ["KUBECONFIG"] = portolan("kubeconfig").strip()
    return took


def first_answer(i):
    app = f"app{i}"
    start = time.monotonic()
    kubectl("apply", "-f", "-", stdin=APP.replace("NAME", app))
    port = kubectl("get", "service", app, "-o", "jsonpath={.spec.ports[0].nodePort}")
    script = f"until curl -sf -o /dev/null --max-time 1 http://192.168.50.11:{port}/; do sleep 0.005; done"
    portolan("exec", "--", "sh", "-c", script)
    took = time.monotonic() - start
    kubectl("delete", "deployment,service", app, "--wait=false")
    return took


def processes():
    """Processes of the cluster: `up`, and everything in its pods' namespaces, found through their parents."""
    root = json.loads(portolan("status", "-o", "json", check=False))["pid"]
    parents = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as f:
                parents[int(pid)] = int(f.read().rsplit(")", 1)[1].split()[1])
        except OSError:
            pass
    found = {root}
    while True:
        more = {p for p, parent in parents.items() if parent in found} - found
        if not more:
            return found
        found |= more


def memory(pids):
    """Resident and proportional set size in MiB, summed."""
    total = {"Rss": 0, "Pss": 0}
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup") as f:
                for line in f:
                    key = line.split(":")[0]
                    if key in total:
                        total[key] += int(line.split()[1])
        except OSError:
            pass
    return total["Rss"] / 1024, total["Pss"] / 1024


def at_rest(when):
    time.sleep(5)
    rss, pss = memory(processes())
    what = f"{when}: resident memory, MiB (proportional: pages of the shared binary counted once)"
    return what, f"{rss:.0f} ({pss:.0f})", "150"


def cpu(pids):
    ticks = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as f:
                fields = f.read().rsplit(")", 1)[1].split()
                ticks += int(fields[11]) + int(fields[12])
        except OSError:
            pass
    return ticks / os.sysconf("SC_CLK_TCK")


def endpoint_to_rule():
    """From the API server's answer to a write of an EndpointSlice until the node's kernel sends a new connection there."""
    kubectl("apply", "-f", "-", stdin="{apiVersion: v1, kind: Service, metadata: {name: swap}, spec: {ports: [{port: 80}]}}")
    address = kubectl("get", "service", "swap", "-o", "jsonpath={.spec.clusterIP}")
    slice_ = (
        '{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{"name":"swap","labels":'
        '{"kubernetes.io/service-name":"swap"}},"addressType":"IPv4","ports":[{"port":9000,"protocol":"TCP"}],"endpoints":%s}'
    )
    # Two servers on a node's own addresses answer with their names; the Service is swapped between them.
    helper = tempfile.NamedTemporaryFile("w", suffix=".py", delete=False)
    helper.write(ENDPOINT_HELPER)
    helper.close()
    config = kubectl("config", "view", "--raw", "-o", "json")
    with open(helper.name + ".json", "w") as f:
        f.write(json.dumps({"config": json.loads(config), "address": address, "slice": slice_}))
    try:
        out = portolan("exec", "--in", "node/node-1", "--", sys.executable, helper.name, helper.name + ".json")
    finally:
        os.unlink(helper.name)
        os.unlink(helper.name + ".json")
    return sorted(json.loads(out))


ENDPOINT_HELPER = r'''
import base64, http.client, json, socket, ssl, sys, tempfile, threading, time
data = json.load(open(sys.argv[1]))
user, cluster = data["config"]["users"][0]["user"], data["config"]["clusters"][0]["cluster"]
def file(text):
    f = tempfile.NamedTemporaryFile(delete=False); f.write(base64.b64decode(text)); f.close(); return f.name
context = ssl.create_default_context(cafile=file(cluster["certificate-authority-data"]))
context.load_cert_chain(file(user["client-certificate-data"]), file(user["client-key-data"]))
context.check_hostname = False
api = http.client.HTTPSConnection("192.168.50.254", 6443, context=context)
addresses = ["192.168.50.11", "10.244.1.1"]
def serve(address):
    s = socket.create_server((address, 9000), backlog=128)
    while True:
        c, _ = s.accept(); c.sendall(address.encode()); c.close()
usable = []
for a in addresses:
    try:
        s = socket.socket(); s.bind((a, 0)); s.close(); usable.append(a)
    except OSError:
        pass
if len(usable) < 2:
    # No pod link carries the gateway address yet: a second loopback-free address is enough.
    import subprocess
    subprocess.run(["ip", "address", "add", "10.244.1.1/32", "dev", "lo"], check=True)
for a in addresses:
    threading.Thread(target=serve, args=(a,), daemon=True).start()
def call(method, path, body):
    api.request(method, path, body=body, headers={"Content-Type": "application/json"})
    r = api.getresponse(); r.read(); return r.status
path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
def body(a): return data["slice"] % json.dumps([{"addresses": [a], "conditions": {"ready": True}}])
call("POST", path, body(addresses[0]))
def ask():
    try:
        with socket.create_connection((data["address"], 80), timeout=1) as s:
            return s.recv(100).decode()
    except OSError:
        return None
while ask() != addresses[0]: time.sleep(0.01)
times = []
for i in range(1, 41):
    wanted = addresses[i % 2]
    start = time.monotonic()
    status = call("PUT", path + "/swap", body(wanted))
    assert status == 200, status
    while ask() != wanted: pass
    times.append((time.monotonic() - start) * 1000)
print(json.dumps(times))
'''


def main():
    rows = []
    ups = []
    for i in range(RUNS):
        ups.append(up())
        if i < RUNS - 1:
            portolan("down", "--purge")
    rows.append(("`up` to all system pods ready, s", f"{statistics.median(ups):.2f}", "3"))
    rows.append(at_rest("at rest, 2 nodes"))
    answers = [first_answer(i) for i in range(RUNS)]
    rows.append(("apply of 3 pods and a Service to first answer, s", f"{statistics.median(answers):.2f}", "2"))
    deadline = time.monotonic() + 60
    while kubectl("get", "pods", "-o", "name").strip() and time.monotonic() < deadline:
        time.sleep(0.2)
    swaps = endpoint_to_rule()
    rows.append(("endpoint change, API write to first connection there, p50, ms", f"{statistics.median(swaps):.1f}", "20"))
    rows.append(("the same, p99, ms", f"{swaps[int(len(swaps) * 0.99)]:.1f}", "20"))
    kubectl("delete", "service,endpointslice", "swap")
    rows.append(at_rest("after that load, at rest"))
    pids = processes()
    before, start = cpu(pids), time.monotonic()
    time.sleep(20)
    load = (cpu(pids) - before) / (time.monotonic() - start) * 100
    rows.append(("at rest: CPU, % of one core", f"{load:.2f}", "2"))
    model = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.machine())
    print("# Standalone cluster\n")
    print(f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, {time.strftime('%Y-%m-%d')}; medians of {RUNS} runs\n")
    print("| | measured | aim, less than |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


try:
    main()
finally:
    portolan("down", "--purge", check=False)
