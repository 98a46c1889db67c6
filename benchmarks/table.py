"""Turn pytest-benchmark's JSON into the table of docs/performance.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: str) -> None:
    """Print a Markdown table of the benchmarks in *path*."""
    data = json.loads(Path(path).read_text())
    machine = data["machine_info"]
    cpu = machine.get("cpu", {}).get("brand_raw", machine.get("processor", "?"))
    print(f"{cpu}, Python {machine['python_version']}, {data['datetime'][:10]}\n")
    print("| benchmark | seconds (best) | seconds (median) | events per second | |")
    print("|---|---|---|---|---|")
    for item in data["benchmarks"]:
        stats, info = item["stats"], dict(item["extra_info"])
        info.pop("events", None)
        rate = info.pop("events_per_s", 0)
        more = ", ".join(f"{key} {value:,}" for key, value in info.items())
        name = item["name"].removeprefix("test_")
        print(f"| {name} | {stats['min']:.2f} | {stats['median']:.2f} | {rate:,} | {more} |")


if __name__ == "__main__":
    main(sys.argv[1])
