"""From a compact network's folder to a bundle that has proved itself: what a deployment pipeline does, in order.

python engines/pipeline.py runs/imp_refill-resnet_digits/compact shipped [TARGET]
"""

import sys
from pathlib import Path

import torch

import deploy_sparse
from deploy_sparse.surgery.plan import SurgeryPlan


def main(compact: str, out: str, target: str = "cpu") -> None:
    network = deploy_sparse.load_compact(compact)  # an ordinary nn.Module; every hash is checked
    inputs = torch.randn(2, *SurgeryPlan.load(compact).model.input_shape)
    engine = deploy_sparse.build_engine(network, target, inputs, Path(out) / "engines", name="network")
    print("found" if engine.cached else "built", engine.folder.name, engine.manifest["parity"])

    if engine.runnable() is None:
        with deploy_sparse.load_engine(engine) as runner:  # every hash again, then the checks of each run's inputs
            outputs = runner.run(runner.sample_inputs(batch=2))
        print("ran", {name: array.shape for name, array in outputs.items()})
    else:
        print(engine.runnable())

    made = deploy_sparse.bundle_engine(engine, format="zip", out=Path(out) / "network.zip")
    received = deploy_sparse.open_bundle(made.path).rebuild(Path(out) / "received")  # what the other machine does
    print("bundled", made.path.name, "and rebuilt:", received.proof)


if __name__ == "__main__":
    main(*sys.argv[1:])
