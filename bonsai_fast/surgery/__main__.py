"""`python -m bonsai_fast.surgery PARENT_DIR MASK OUT_DIR`: cut a checkpoint without loading it.

MASK is the masks/NAME.safetensors of a run. Progress goes to stderr; the last line of stdout is
JSON. A request that cannot be met ends with one line and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any, cast

from bonsai_fast.checkpoints.safetensors_writer import MAX_SHARD_SIZE
from bonsai_fast.console import INTERRUPTED, OneLineParser, Reporter, fail, silence_transformers
from bonsai_fast.runs.mask_files import load_mask
from bonsai_fast.surgery.slice_checkpoint import slice_checkpoint


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; a bad one exits with code 2 and one line."""
    parser = OneLineParser(cast(Any, ()), prog="python -m bonsai_fast.surgery", description=__doc__)
    parser.add_argument("parent_dir", help="Directory of the model, in safetensors.")
    parser.add_argument("mask", help="Keep mask: masks/NAME.safetensors of a run.")
    parser.add_argument("output_dir", help="New directory for the smaller model.")
    parser.add_argument(
        "--max-shard-size", default=MAX_SHARD_SIZE, help="Largest weight file, such as 5GB."
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="Run model code that the parent carries."
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(arguments)
    reporter = Reporter()
    silence_transformers()
    try:
        mask = load_mask(options.mask)
        result = slice_checkpoint(
            options.parent_dir,
            mask.keep,
            options.output_dir,
            attention=mask.attention,
            sublayers=mask.sublayers,
            max_shard_size=options.max_shard_size,
            trust_remote_code=options.trust_remote_code,
            reporter=reporter,
        )
    except (ValueError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    if result.unknown_tensors:
        reporter.warn(
            f"{len(result.unknown_tensors)} tensors are none of the model's and stay as they are, "
            f"first {result.unknown_tensors[0]}"
        )
    reporter.note(
        f"saved to {result.output}: {result.parameters:,} of {result.parameters_dense:,} "
        f"parameters, {result.num_bytes / 1e9:.2f} GB in {result.seconds:.1f} s"
    )
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
