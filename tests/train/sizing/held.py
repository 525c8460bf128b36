"""One rank of a training stage that writes what its engine holds: `accelerate launch held.py RECIPE WORKSPACE OVERRIDE…`."""

import json
import os
import sys
from pathlib import Path

from graft.core.stages import Plan
from graft.train import checkpoint, loop


def main(recipe, workspace, *overrides):
    save = checkpoint.Writer.save

    def counted(writer, cursor):
        engine, zero = writer._engine, writer._engine.optimizer
        of_optimizer = [*zero.single_partition_of_fp32_groups]
        of_optimizer += [t for state in zero.optimizer.state.values() for t in state.values() if hasattr(t, "untyped_storage")]
        tensors = {"weights": [*engine.module.parameters(), *engine.module.buffers()], "optimizer": of_optimizer}
        held = {kind: sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in own)}.values()) for kind, own in tensors.items()}
        (Path(workspace) / f"held-{os.environ['RANK']}.json").write_text(json.dumps(held))
        return save(writer, cursor)

    checkpoint.Writer.save = counted
    loop.run(Plan(recipe, overrides, workspace).resolve("sft"))


main(*sys.argv[1:])
