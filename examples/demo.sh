#!/usr/bin/env bash
# Starts a standalone cluster (or uses the running one), applies the example manifests and follows requests along the whole path.
# usage: examples/demo.sh PORTOLAN-BINARY [NAME]     Ends with a non-zero code if any hop fails. May be run again.
set -uo pipefail
cd "$(dirname "$0")"

portolan=$(realpath "${1:?usage: demo.sh PORTOLAN-BINARY [NAME]}" 2>/dev/null || realpath "../$1")
name=${2:-demo}
failures=0

bold=$(tput bold 2>/dev/null || true)
plain=$(tput sgr0 2>/dev/null || true)

say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
note() { printf '   %s\n' "$*"; }
fail() {
  printf '   FAILED: %s\n' "$*"
  failures=$((failures + 1))
}

# show PATTERN COMMAND...: runs a command, prints it and its output, and expects the output to match.
show() {
  local pattern=$1 output status
  shift
  printf '   $ %s\n' "${*//$portolan/portolan}"
  output=$("$@" 2>&1)
  status=$?
  # The echo server lists the request's headers too; what matters here is who answered and what it saw.
  printf '%s\n' "$output" | sed -E 's/"headers":\{[^}]*\},//; s/^/     /' | cut -c1-240
  if ! grep -qE -- "$pattern" <<<"$output"; then
    fail "expected output to match: $pattern (exit code $status)"
  fi
}

# until_ok SECONDS COMMAND...: repeats a command until it succeeds.
until_ok() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    if [ $SECONDS -ge $deadline ]; then
      fail "not within the deadline: $*"
      return 1
    fi
    sleep 0.1
  done
}

# has_address NAMESPACE OBJECT: whether a Service or an Ingress has a load balancer's address (kubectl wait knows no jsonpath before 1.23).
has_address() {
  [ -n "$(kubectl -n "$1" get "$2" -o jsonpath='{.status.loadBalancer.ingress[*].ip}')" ]
}

say "1. A cluster, from nothing but the binary"
if ! "$portolan" status --name "$name" >/dev/null 2>&1; then
  "$portolan" up --name "$name" --nodes 2 --zones 2 --detach || exit 1
fi
"$portolan" status --name "$name"
KUBECONFIG=$("$portolan" kubeconfig --name "$name") || exit 1
export KUBECONFIG
outside=("$portolan" exec --name "$name" --in outside --)
toolbox=(kubectl -n production exec toolbox --)

say "2. Ordinary manifests, applied by an ordinary kubectl"
kubectl apply -f 00-namespaces.yaml
if ! kubectl -n production get secret example-com-tls >/dev/null 2>&1; then
  keys=$(mktemp -d)
  openssl req -x509 -newkey rsa:2048 -nodes -days 30 -keyout "$keys/tls.key" -out "$keys/tls.crt" -subj /CN=example.com \
    -addext subjectAltName=DNS:api.example.com,DNS:admin.example.com 2>/dev/null
  kubectl -n production create secret tls example-com-tls --cert="$keys/tls.crt" --key="$keys/tls.key"
  rm -r "$keys"
fi
for file in api-backend postgres-cluster web-frontend-nodeport web-frontend-lb apps web-ingress rewrite-ingress external-name toolbox; do
  kubectl apply -f "$file.yaml" || fail "apply $file.yaml"
done
for object in "production deployment/api-backend" "production deployment/web-frontend" "production deployment/users-api" \
  "production deployment/products-api" "production deployment/admin-console" "default deployment/web-frontend" \
  "database statefulset/postgres-cluster"; do
  read -r ns target <<<"$object"
  kubectl -n "$ns" rollout status "$target" --timeout=60s || fail "$target"
done
kubectl -n production wait pod/toolbox --for=condition=Ready --timeout=60s >/dev/null || fail "toolbox"
kubectl get pods -A -o wide
kubectl get services -A

say "3. DNS, asked by a pod"
show '^10\.(9[6-9]|10[0-9]|11[01])\.' "${toolbox[@]}" dig +short +search api-backend
show 'svc\.cluster\.local\.$' "${toolbox[@]}" dig +short SRV _http._tcp.api-backend.production.svc.cluster.local
show '^10\.244\.' "${toolbox[@]}" dig +short postgres-cluster-0.postgres-cluster.database.svc.cluster.local
show 'db\.corp\.example\.' "${toolbox[@]}" dig +short CNAME external-database.production.svc.cluster.local

say "4. ClusterIP: from a pod, by name"
show '"pod":"api-backend-' "${toolbox[@]}" curl -sS --max-time 5 http://api-backend/hello
show '"pod":"api-backend-' "${toolbox[@]}" curl -sS --max-time 5 http://api-backend.production.svc.cluster.local/hello
note "ten connections are spread over the three pods:"
for _ in $(seq 10); do "${toolbox[@]}" curl -sS --max-time 5 http://api-backend/ | grep -o '"pod":"[^"]*"'; done | sort | uniq -c | sed 's/^/     /'

say "5. NodePort: on every node, from a host outside the cluster"
for address in $(kubectl get nodes -o jsonpath='{.items[*].status.addresses[?(@.type=="InternalIP")].address}'); do
  show '"pod":"web-frontend-' "${outside[@]}" curl -sS --max-time 5 "http://$address:30080/"
done

say "6. LoadBalancer: an address of its own, from outside"
until_ok 20 has_address production service/web-frontend-lb
address=$(kubectl -n production get service web-frontend-lb -o jsonpath='{.status.loadBalancer.ingress[0].ip}')
show '"pod":"web-frontend-' "${outside[@]}" curl -sS --max-time 5 "http://$address/"

say "7. Ingress: by name, with TLS, through DNS, load balancer, proxy and Service endpoints"
until_ok 20 has_address production ingress/web-ingress
show '^192\.168\.70\.' "${outside[@]}" dig +short api.example.com
show '"path":"/",.*"pod":"users-api-' "${outside[@]}" curl -sSk --max-time 5 https://api.example.com/users
show '"pod":"products-api-' "${outside[@]}" curl -sSk --max-time 5 https://api.example.com/products
show '"pod":"admin-console-' "${outside[@]}" curl -sSk --max-time 5 https://admin.example.com/
show '308|301' "${outside[@]}" curl -sS --max-time 5 -o /dev/null -w '%{http_code} %{redirect_url}\n' http://api.example.com/users
note "capture groups in the rewrite: /api/v1/users reaches the pod as /users"
show '"path":"/users"' "${outside[@]}" curl -sS --max-time 5 http://rewrite.example.com/api/v1/users
http=$("$portolan" status --name "$name" -o json | python3 -c 'import json,sys; print(json.load(sys.stdin)["http"])')
note "and from this machine, on a published port of 127.0.0.1:"
show '"path":"/users"' curl -sS --max-time 5 -H 'Host: rewrite.example.com' "http://$http/api/v1/users"

say "8. A pod dies under a running client"
results=$(mktemp)
"${toolbox[@]}" sh -c 'i=0; while [ $i -lt 200 ]; do curl -s -o /dev/null --max-time 2 -w "%{http_code}\n" http://api-backend/ || true; i=$((i+1)); done' >"$results" &
client=$!
until_ok 10 test -s "$results"
victim=$(kubectl -n production get pods -l app=api-backend -o jsonpath='{.items[0].metadata.name}')
show 'deleted' kubectl -n production delete pod "$victim"
wait "$client"
failed=$(grep -cv '^200$' "$results" || true)
note "of $(wc -l <"$results") requests, $failed failed"
[ "$failed" -le 2 ] || fail "more than the requests in flight failed"
rm -f "$results"
kubectl -n production rollout status deployment/api-backend --timeout=60s >/dev/null || fail "the pod was not replaced"
show 'Running' kubectl -n production get pods -l app=api-backend -o wide

say "9. Two Services want the same node port"
show 'provided port is already allocated' kubectl apply -f nodeport-conflict.yaml

if [ "$failures" -gt 0 ]; then
  say "$failures hops failed."
  note "look around with: export KUBECONFIG=$KUBECONFIG; kubectl get events -A --sort-by=.lastTimestamp"
  exit 1
fi
say "Every hop works. To go on:"
cat <<END
   export KUBECONFIG=$KUBECONFIG
   kubectl get pods -A
   curl -H 'Host: rewrite.example.com' http://$http/api/v1/users
   $portolan exec --name $name -- curl -k https://api.example.com/users
   $portolan status --name $name
   $portolan down --name $name          (--purge also removes its data)
END
