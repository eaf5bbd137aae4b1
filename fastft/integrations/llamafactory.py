"""LLaMA-Factory: ``python -m fastft.integrations.llamafactory train.yaml`` for ``llamafactory-cli train train.yaml``.

On several GPUs ``torchrun --nproc-per-node N -m fastft.integrations.llamafactory train.yaml``.
"""

from __future__ import annotations

from fastft.integrations.trainer import TrainerCallback


def main() -> None:
    """Train as the YAML says, whose ``fastft:`` holds the backend's options; raises OptionsError for an unknown one."""
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp

    args = read_args()
    options = args.pop("fastft", None) if isinstance(args, dict) else None
    run_exp(args, callbacks=[TrainerCallback(options)])


if __name__ == "__main__":
    main()
