#!/usr/bin/env python3
"""Two parts of a release that no small tool writes: an image without an engine, and the list of parts.

usage: release.py image FOLDER FILE VERSION   FOLDER has a folder and a file ARCH.platform for each
       release.py sbom METADATA FILE          METADATA is what `cargo metadata` prints
"""
import gzip
import hashlib
import io
import json
import os
import pathlib
import sys
import tarfile
from datetime import datetime, timezone

NAME = "mqtt-publisher-lite"
EPOCH = int(os.environ["SOURCE_DATE_EPOCH"])
CREATED = datetime.fromtimestamp(EPOCH, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
# Who runs in the container, as in contrib/docker/Dockerfile.
USER = 65532


def entry(name, mode, owner=0, size=0, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.mode, info.uid, info.gid, info.size, info.type, info.mtime = mode, owner, owner, size, kind, EPOCH
    return info


class Image:
    """An OCI image layout: blobs by their digests, and an index of one manifest for each platform."""

    def __init__(self):
        self.blobs = {}

    def blob(self, media_type, data):
        if not isinstance(data, bytes):
            data = json.dumps(data, sort_keys=True).encode()
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def manifest(self, program, platform, version):
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            tar.addfile(entry("data", 0o755, USER, kind=tarfile.DIRTYPE))
            tar.addfile(entry(NAME, 0o755, size=len(program)), io.BytesIO(program))
        layer = layer.getvalue()
        arch, _, variant = platform.partition("/")
        where = {"architecture": arch, "os": "linux", **({"variant": variant} if variant else {})}
        config = {
            **where,
            "created": CREATED,
            "config": {
                "User": f"{USER}:{USER}",
                "Env": ["DATA_DIR=/data"],
                "Entrypoint": [f"/{NAME}"],
                "Volumes": {"/data": {}},
                "ExposedPorts": {"3002/tcp": {}},
                "Labels": {"org.opencontainers.image.version": version},
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
            "history": [{"created": CREATED, "created_by": "scripts/release.sh"}],
        }
        kind = "application/vnd.oci.image."
        manifest = {
            "schemaVersion": 2,
            "mediaType": kind + "manifest.v1+json",
            "config": self.blob(kind + "config.v1+json", config),
            "layers": [self.blob(kind + "layer.v1.tar+gzip", gzip.compress(layer, 9, mtime=0))],
        }
        return {**self.blob(manifest["mediaType"], manifest), "platform": where}

    def write(self, manifests, version, path):
        index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}
        top = {**self.blob(index["mediaType"], index), "annotations": {"org.opencontainers.image.ref.name": version}}
        files = {f"blobs/sha256/{digest}": data for digest, data in sorted(self.blobs.items())}
        files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [top]}, sort_keys=True).encode()
        files["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
        with tarfile.open(path, "w") as tar:
            for name, data in files.items():
                tar.addfile(entry(name, 0o644, size=len(data)), io.BytesIO(data))


def image(folder, path, version):
    folder = pathlib.Path(folder)
    built = Image()
    manifests = []
    for platform in sorted(folder.glob("*.platform")):
        program = (folder / platform.stem / NAME).read_bytes()
        manifests.append(built.manifest(program, platform.read_text().strip(), version))
    built.write(manifests, version, path)


def sbom(metadata, path):
    """The packages that the program is linked from; what only its tests or its build need is left out."""
    metadata = json.loads(pathlib.Path(metadata).read_text())
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    root = next(id for id, package in packages.items() if package["name"] == NAME)

    def linked(id):
        kinds = lambda dep: [kind["kind"] for kind in dep["dep_kinds"]]
        return [dep["pkg"] for dep in nodes[id]["deps"] if None in kinds(dep)]

    seen, todo = set(), [root]
    while todo:
        id = todo.pop()
        if id not in seen:
            seen.add(id)
            todo.extend(linked(id))

    def component(id):
        package = packages[id]
        purl = f"pkg:cargo/{package['name']}@{package['version']}"
        licence = [{"expression": package["license"].replace("/", " OR ")}] if package["license"] else []
        kind = "application" if id == root else "library"
        return {"type": kind, "bom-ref": purl, "name": package["name"], "version": package["version"],
                "purl": purl, "licenses": licence}

    parts = {id: component(id) for id in seen}
    ordered = sorted(seen, key=lambda id: parts[id]["bom-ref"])
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"timestamp": CREATED, "component": parts[root]},
        "components": [parts[id] for id in ordered if id != root],
        "dependencies": [
            {"ref": parts[id]["bom-ref"], "dependsOn": sorted(parts[dep]["bom-ref"] for dep in linked(id))}
            for id in ordered
        ],
    }
    pathlib.Path(path).write_text(json.dumps(bom, indent=1) + "\n")


if __name__ == "__main__":
    {"image": image, "sbom": sbom}[sys.argv[1]](*sys.argv[2:])
