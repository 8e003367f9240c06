"""`peftkit doctor`: versions, devices, what is built, and what is missing for what."""

from __future__ import annotations

import json

from peftkit.cli.app import Json, app


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, devices, what is built, and what is missing for what."""
    from peftkit.doctor import examine

    found = examine()
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print(f"peftkit {found.peftkit}, Python {found.python}, {found.system}\n")
    print("packages")
    for package in found.packages:
        kind = "" if package.required else "  (optional)"
        print(f"  {package.name:<20} {package.version or 'missing':<12} {package.needed_for}{kind}")
    print("\ndevices")
    for device in found.devices:
        memory = "" if device.memory_bytes is None else f", {device.memory_bytes / 2**30:.1f} GiB"
        print(f"  {device.name:<8} {device.description}{memory}")
    print(f"  PyTorch uses {found.threads} thread{'s' if found.threads != 1 else ''} for one operation on the CPU")
    print("\ncompiled operations")
    print(f"  {', '.join(found.built) or 'none is built'}")
    if found.third_party_methods:
        print(f"\nmethods registered by other packages\n  {', '.join(found.third_party_methods)}")
    print("\nmissing")
    for line in found.missing:
        print(f"  {line}")
