"""Write what evaluate.py measured in several folders as one table.

python docs/collect.py docs/tables/div2k.csv runs/div2k/*      a row for each folder's metrics.json
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from checkpoint import read_result
from utils import METRICS_AND_FEATURE_ERROR, cli_main, write_csv


def row_of(folder):
    """{column: value} of a folder with metrics.json."""
    found = read_result(folder / "metrics.json")
    config = found["config"]
    row = {"run": folder.name, "data": Path(found["data"]).name, "images": found["images"]}
    row |= {key: config[key] for key in ("encoder", "layer", "decoder")}
    row |= {"protocol": found["protocol"], "iterations": found.get("iterations", "")}
    row["parameters"] = found["parameters"]
    for name in METRICS_AND_FEATURE_ERROR:
        row |= {name: f"{found[name]['mean']:.5f}", f"{name}_std": f"{found[name]['std']:.5f}"}
    for kind, values in found["baselines"].items():
        row[f"{kind}_psnr"] = f"{values['psnr']['mean']:.2f}"
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="CSV file to write")
    parser.add_argument("folders", type=Path, nargs="+", help="folders with metrics.json")
    args = parser.parse_args()
    rows = [row_of(folder) for folder in args.folders]
    write_csv(args.table, list(rows[0]), [row.values() for row in rows])


if __name__ == "__main__":
    cli_main(main)
