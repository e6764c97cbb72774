"""OCI images in a tar file, by the image specification and nothing else. Standard library only."""

import gzip
import hashlib
import io
import json
import os
import tarfile

_KIND = "application/vnd.oci.image."


def member(name, data=b"", **attributes):
    """A tar entry with its content: ``type``, ``mode``, ``linkname`` and so on as of ``tarfile.TarInfo``."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    entry.mode = 0o644
    for key, value in attributes.items():
        setattr(entry, key, value)
    return entry, data


def layer_of(*members):
    """A layer of these entries."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for entry, data in members:
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def tar_of(root):
    """A layer of all that a directory holds."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(root, arcname=".")
    return buffer.getvalue()


def write_oci_archive(path, layers, *, name="image", config=None, compress=False, blobs=None):
    """An image of these layers; ``blobs``, changed afterwards, is what the file really holds."""
    held = {}

    def blob(kind, data):
        digest = hashlib.sha256(data).hexdigest()
        held[digest] = data
        return {"mediaType": _KIND + kind, "digest": f"sha256:{digest}", "size": len(data)}

    kind, pack = ("layer.v1.tar+gzip", gzip.compress) if compress else ("layer.v1.tar", bytes)
    packed = [blob(kind, pack(layer)) for layer in layers]
    settings = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
        "os": "linux",
        "config": config or {"Env": ["FROM_ARCHIVE=yes"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _KIND + "manifest.v1+json",
        "config": blob("config.v1+json", json.dumps(settings).encode()),
        "layers": packed,
    }
    listed = {
        **blob("manifest.v1+json", json.dumps(manifest).encode()),
        "annotations": {"org.opencontainers.image.ref.name": name},
    }
    files = {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [listed]}).encode(),
        **{f"blobs/sha256/{digest}": data for digest, data in held.items()},
    }
    with tarfile.open(path, "w") as archive:
        for name_inside, data in {**files, **(blobs or {})}.items():
            archive.addfile(*(lambda entry, content: (entry, io.BytesIO(content)))(*member(name_inside, data)))
    return path
