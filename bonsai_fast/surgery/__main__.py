"""Cut a checkpoint down to the units of a saved mask, without loading the model.

MASK is masks/NAME.safetensors of a run. The weights are copied block by block, so a model of any
size needs little memory. Progress is written to stderr; the last line of stdout is JSON.

    bonsai-fast surgery PARENT runs/mine/masks/final.safetensors smaller
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from bonsai_fast.checkpoints.load import TrustOptions
from bonsai_fast.checkpoints.safetensors_writer import MAX_SHARD_SIZE
from bonsai_fast.command_line import FILES, Command, argument, entries_of, save_config
from bonsai_fast.config.options import OUTPUT, option
from bonsai_fast.console import INTERRUPTED, Reporter, fail, silence_transformers
from bonsai_fast.runs.mask_files import load_mask
from bonsai_fast.surgery.slice_checkpoint import slice_checkpoint


@dataclass(frozen=True, kw_only=True)
class SurgeryOptions(TrustOptions):
    """How the smaller model is written."""

    max_shard_size: str = option(
        MAX_SHARD_SIZE, "Largest weight file, such as 5GB.", group=OUTPUT, value="SIZE"
    )


COMMAND = Command(
    "surgery",
    __doc__,
    (
        argument("parent", str, "Directory of the model, in safetensors."),
        argument("mask", str, "Saved mask: which units stay."),
        argument("output", str, "New directory for the smaller model."),
    ),
    (*entries_of(SurgeryOptions), *FILES),
)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    given, save_to = COMMAND.parse(arguments)
    places = {item.name: given.pop(item.name) for item in COMMAND.arguments}
    options = SurgeryOptions(**given)
    reporter = Reporter()
    silence_transformers()
    try:
        save_config(save_to, **places, **asdict(options))
        mask = load_mask(places["mask"])
        result = slice_checkpoint(
            places["parent"],
            mask.keep,
            places["output"],
            attention=mask.attention,
            experts=mask.experts,
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
            f"{len(result.unknown_tensors)} tensors do not belong to the model and were copied "
            f"unchanged, the first of them {result.unknown_tensors[0]}"
        )
    reporter.note(
        f"saved to {result.output}: {result.parameters:,} of {result.parameters_dense:,} "
        f"parameters, {result.num_bytes / 1e9:.2f} GB in {result.seconds:.1f} s"
    )
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
