#!/usr/bin/env python3
"""Writes crates/api/src/schema/types.txt: the structure of the built-in API types.

Input are the published Go modules of the Kubernetes API. Only facts of the interface are taken from them: names and
types of fields, JSON and protobuf tags, list and map keys, patch strategies, defaults, enumerations and whether a field
is required. Comments of the modules are never copied.

Usage: generate.py [--check]      (needs the `go` command, which fetches the modules)
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

VERSION = "v0.36.0"
MODULES = ["k8s.io/api", "k8s.io/apimachinery", "k8s.io/apiextensions-apiserver"]
OUTPUT = pathlib.Path(__file__).resolve().parents[2] / "crates/api/src/schema/types.txt"

API = "k8s.io/api"
META = "k8s.io/apimachinery/pkg/apis/meta/v1"
APIEXTENSIONS = "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
# Packages whose kinds are served; types of other packages follow when a field refers to them.
PACKAGES = [META] + [
    f"{API}/{name}"
    for name in (
        "core/v1 apps/v1 discovery/v1 networking/v1 coordination/v1 events/v1 rbac/v1 authentication/v1 "
        "authorization/v1 policy/v1 autoscaling/v1 autoscaling/v2 batch/v1 scheduling/v1 node/v1 storage/v1 "
        "admissionregistration/v1 apidiscovery/v2"
    ).split()
] + [APIEXTENSIONS]

# Go types with a JSON form of their own.
LEAVES = {
    f"{META}.Time": "time",
    f"{META}.MicroTime": "microtime",
    f"{META}.Duration": "duration",
    f"{META}.FieldsV1": "fields",
    "k8s.io/apimachinery/pkg/api/resource.Quantity": "quantity",
    "k8s.io/apimachinery/pkg/util/intstr.IntOrString": "intorstring",
    "k8s.io/apimachinery/pkg/runtime.RawExtension": "raw",
    f"{APIEXTENSIONS}.JSON": "any",
    f"{APIEXTENSIONS}.JSONSchemaPropsOrArray": "orarray",
    f"{APIEXTENSIONS}.JSONSchemaPropsOrBool": "orbool",
    f"{APIEXTENSIONS}.JSONSchemaPropsOrStringArray": "orstrings",
}
SCALARS = {"string", "bool", "int", "int32", "int64", "float64", "byte", "uint16", "uint32", "uint64", "rune", "uint8"}
# Not part of any request or answer that a document can have.
SKIP_KINDS = {f"{META}.InternalEvent", f"{META}.TypeMeta"}


class Type:
    def __init__(self, name, kind, expression, fields, markers):
        self.name, self.kind, self.expression, self.fields, self.markers = name, kind, expression, fields, markers


class Package:
    """The declarations of one Go package that matter here."""

    def __init__(self, path, directory):
        self.path = path
        self.types, self.constants, self.group, self.model = {}, {}, None, None
        for file in sorted(directory.glob("*.go")):
            if file.name.endswith("_test.go") or "swagger_doc" in file.name or "generated.pb" in file.name:
                continue
            if file.name.startswith("zz_generated"):
                if file.name == "zz_generated.model_name.go":
                    match = re.search(r'return "([\w.-]+)\.\w+"', file.read_text())
                    self.model = match and match.group(1)
                continue
            self.read(file.read_text())

    def read(self, text):
        group = re.search(r'GroupName\s*(?:string)?\s*= "([^"]*)"', text)
        if group and self.group is None:
            self.group = group.group(1)
        imports = {}
        block = re.search(r"^import \(\n(.*?)^\)", text, re.S | re.M)
        for line in (block.group(1) if block else "").splitlines():
            match = re.match(r'\s*(\w+)?\s*"([^"]+)"', line)
            if match:
                imports[match.group(1) or match.group(2).rsplit("/", 1)[-1]] = match.group(2)
        single = re.search(r'^import (\w+ )?"([^"]+)"', text, re.M)
        if single:
            imports[(single.group(1) or single.group(2).rsplit("/", 1)[-1]).strip()] = single.group(2)
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        lines = text.splitlines()
        comments, previous, at = [], [], 0
        while at < len(lines):
            line = lines[at]
            at += 1
            stripped = line.strip()
            if stripped.startswith("//"):
                comments.append(stripped[2:].strip())
                continue
            if not stripped:
                if comments:
                    previous, comments = comments, []
                continue
            constant = re.match(r'(?:const )?\s*(\w+)\s+(\w+)\s*=\s*"([^"]*)"', line)
            if constant:
                self.constants.setdefault(constant.group(2), []).append(constant.group(3))
            match = re.match(r"type (\w+) (.*)$", line)
            if match:
                name, rest = match.groups()
                markers = parse_markers(previous + comments)
                if rest == "struct {":
                    fields, at = self.read_struct(lines, at, imports)
                    self.types[name] = Type(name, "struct", None, fields, markers)
                elif rest == "struct{}":
                    self.types[name] = Type(name, "struct", None, [], markers)
                elif not rest.startswith(("interface", "func", "=")):
                    expression = self.resolve(rest.split("//")[0].strip(), imports)
                    self.types[name] = Type(name, "named", expression, [], markers)
            comments, previous = [], []

    def read_struct(self, lines, at, imports):
        fields, comments = [], []
        while lines[at].strip() != "}":
            stripped = lines[at].strip()
            at += 1
            if stripped.startswith("//"):
                comments.append(stripped[2:].strip())
                continue
            if not stripped:
                comments = []
                continue
            match = re.match(r"(?:(\w+)\s+)?([^\s`]+)(?:\s+`(.*)`)?\s*(?://.*)?$", stripped)
            if match:
                go_name, expression, tags = match.groups()
                tags = dict(re.findall(r'(\w+):"((?:[^"\\]|\\.)*)"', tags or ""))
                fields.append((go_name, self.resolve(expression, imports), tags, parse_markers(comments)))
            comments = []
        return fields, at + 1

    def resolve(self, expression, imports):
        """The Go type expression with every named type spelled with its package path."""
        if expression.startswith("*"):
            return ("ptr", self.resolve(expression[1:], imports))
        if expression.startswith("[]"):
            return ("list", self.resolve(expression[2:], imports))
        match = re.match(r"map\[([\w.]+)\](.*)$", expression)
        if match:
            return ("map", self.resolve(match.group(2), imports))
        if expression in SCALARS:
            return ("scalar", expression)
        if expression in ("interface{}", "any"):
            return ("scalar", "any")
        if "." in expression:
            alias, name = expression.split(".", 1)
            return ("name", imports.get(alias, alias), name)
        return ("name", self.path, expression)


def parse_markers(comments):
    markers = {}
    for comment in comments:
        match = re.match(r"\+([\w:.-]+)(?:=(.*))?$", comment)
        if match:
            markers.setdefault(match.group(1), []).append((match.group(2) or "").strip())
    return markers


class Generator:
    def __init__(self, directories):
        self.directories, self.packages, self.needed = directories, {}, []

    def package(self, path):
        if path not in self.packages:
            for module, directory in self.directories.items():
                if path == module or path.startswith(module + "/"):
                    self.packages[path] = Package(path, directory / path[len(module) + 1 :])
                    break
            else:
                raise SystemExit(f"package {path} is in no module")
        return self.packages[path]

    def alias(self, path):
        if path == APIEXTENSIONS:
            return "apiextensions/v1"
        return "/".join(path.split("/")[-2:])

    def spell(self, expression, origin):
        """The type as it is written in the table."""
        tag = expression[0]
        if tag == "ptr":
            return "*" + self.spell(expression[1], origin)
        if tag == "list":
            if expression[1] in (("scalar", "byte"), ("scalar", "uint8")):
                return "bytes"
            return "[]" + self.spell(expression[1], origin)
        if tag == "map":
            return "{}" + self.spell(expression[1], origin)
        if tag == "scalar":
            return expression[1]
        _, path, name = expression
        full = f"{path}.{name}"
        if full in LEAVES:
            if name.startswith("JSONSchemaPropsOr"):
                self.need(path, "JSONSchemaProps")
            return LEAVES[full]
        if path == "k8s.io/apimachinery/pkg/types":
            return f"string<types.{name}>"
        if path == "k8s.io/apimachinery/pkg/runtime":
            return "raw"
        declared = self.package(path).types.get(name)
        if declared is None:
            raise SystemExit(f"{full} is not declared")
        if declared.kind == "named":
            inner = self.spell(declared.expression, origin)
            if inner.startswith("[]"):
                # In protobuf these are messages with one repeated field.
                return ("items" if "protobuf.nullable" in declared.markers else "") + inner
            if inner.startswith("{}"):
                return inner
            suffix = ""
            if "enum" in declared.markers:
                suffix = ":" + ",".join(sorted(set(self.package(path).constants.get(name, []))))
            return f"{inner}<{path.rsplit('/', 1)[-1]}.{name}{suffix}>"
        self.need(path, name)
        return name if path == origin else f"{self.alias(path)}.{name}"

    def need(self, path, name):
        if (path, name) not in self.needed:
            self.needed.append((path, name))

    def field(self, go_name, expression, tags, markers, origin):
        """One line of the table, None for fields without a JSON form."""
        if "json" not in tags and "protobuf" not in tags:
            return None
        name, *options = tags.get("json", "").split(",")
        number = 0
        if tags.get("protobuf", "-") != "-":
            number = int(tags["protobuf"].split(",")[1])
        if name == "-":
            return None
        words = []
        if "inline" in options or (not name and go_name is None):
            if expression == ("name", META, "TypeMeta"):
                return "kind"
            name = "+"
        elif not name:
            name = go_name
        if "omitempty" in options:
            words.append("omit")
        if "omitzero" in options:
            words.append("omitzero")
        required = not ("omitempty" in options or "omitzero" in options)
        if "optional" in markers or "k8s:optional" in markers:
            required = False
        if "required" in markers or "k8s:required" in markers:
            required = True
        if required and name != "+":
            words.append("required")
        if "nullable" in markers:
            words.append("nullable")
        if "listType" in markers:
            kind = markers["listType"][0]
            if kind == "map":
                words.append("keys=" + ",".join(markers["listMapKey"]))
            elif kind == "set":
                words.append("set")
        if markers.get("mapType") == ["atomic"] or markers.get("structType") == ["atomic"]:
            words.append("atomic")
        # The Go tags are what the server's patch code reads; the markers only describe them.
        if tags.get("patchStrategy"):
            words.append("patch=" + tags["patchStrategy"])
        if tags.get("patchMergeKey"):
            words.append("mergekey=" + tags["patchMergeKey"])
        if "default" in markers:
            default = markers["default"][0]
            reference = re.match(r"ref\((\w+)\)$", default)
            if reference:
                default = json.dumps(self.reference(origin, reference.group(1)))
            words.append("default=" + json.dumps(json.loads(default)))
        return "\t".join([name, self.spell(expression, origin), str(number)] + ([" ".join(words)] if words else []))

    def reference(self, path, constant):
        directory = self.directories[API] / path[len(API) + 1 :]
        for file in directory.glob("types*.go"):
            match = re.search(rf'\b{constant}\s+\w+\s*=\s*"([^"]*)"', file.read_text())
            if match:
                return match.group(1)
        raise SystemExit(f"constant {constant} not found")

    def run(self):
        for path in PACKAGES:
            for name, declared in sorted(self.package(path).types.items()):
                if f"{path}.{name}" in SKIP_KINDS or declared.kind != "struct":
                    continue
                if any(e == ("name", META, "TypeMeta") for _, e, _, _ in declared.fields):
                    self.need(path, name)
        lines_of, position = {}, 0
        while position < len(self.needed):
            path, name = self.needed[position]
            position += 1
            declared = self.package(path).types[name]
            head = f"type {name}"
            if declared.markers.get("structType") == ["atomic"]:
                head += " atomic"
            lines = []
            for go_name, expression, tags, markers in declared.fields:
                line = self.field(go_name, expression, tags, markers, path)
                if line == "kind":
                    head += " document"
                elif line:
                    lines.append(line)
            lines_of[path, name] = [head] + lines
        out = [
            "# Structure of the built-in API types. Generated by xtask/schema/generate.py; do not edit.",
            "# Source: " + ", ".join(f"{module} {VERSION}" for module in MODULES),
        ]
        for path in sorted({path for path, _ in lines_of}):
            package = self.package(path)
            if not package.model:
                raise SystemExit(f"{path} has no model name")
            version = path.rsplit("/", 1)[-1]
            group = package.group or ""
            out.append(f"package {self.alias(path)} {package.model} {group}/{version}")
            for (owner, name), lines in sorted(lines_of.items()):
                if owner == path:
                    out.extend(lines)
        return "\n".join(out) + "\n"


def directories():
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for module in MODULES:
            answer = subprocess.run(
                ["go", "mod", "download", "-json", f"{module}@{VERSION}"],
                cwd=scratch, check=True, capture_output=True, text=True,
            )
            found[module] = pathlib.Path(json.loads(answer.stdout)["Dir"])
    return found


def main():
    text = Generator(directories()).run()
    if "--check" in sys.argv[1:]:
        if OUTPUT.read_text() != text:
            raise SystemExit(f"{OUTPUT} is not what the generator writes")
        return
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(text)
    print(f"{OUTPUT}: {len(text)} bytes, {text.count(chr(10) + 'type ')} types")


if __name__ == "__main__":
    main()
