"""Trains an experiment: `python train.py --config=configs/emoji_tokenizer.py --workdir=runs/emoji_tokenizer`.

Any setting can be changed on the command line (--config.train.steps=100). Running the same command again resumes.
"""

import sys

from absl import flags

from hart_jax import flags as hart_flags
from hart_jax.config import HartExperiment
from hart_jax.errors import UserError, run_cli
from hart_jax.io.paths import as_path, check_no_pattern, is_remote

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, images.")


def main() -> None:
    hart_flags.parse()
    experiment = hart_flags.experiment()
    if not _WORKDIR.value:
        raise UserError("--workdir is missing: give a folder for checkpoints, logs and images")
    workdir = as_path(_WORKDIR.value, "--workdir")
    check_no_pattern(workdir, "--workdir")
    if not is_remote(workdir) and workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: is a file; give a folder")
    read = {"data.train": experiment.data.train_folders, "data.test": (experiment.data.test,)}
    for name, folders in read.items():
        if not any(folders):
            raise UserError(f"{name} is empty: give a folder of shards (python -m hart_jax.data.shards)")
    shards = [(name, as_path(folder, name)) for name, folders in read.items() for folder in folders]
    warmup, steps = experiment.optimizer.warmup_steps, experiment.train.steps
    if warmup >= steps:
        message = f"warning: optimizer.warmup_steps={warmup}: the learning rate never reaches its peak in {steps} steps"
        print(f"{message}; set it below train.steps", file=sys.stderr, flush=True)
    # After the checks, so that a wrong setting is reported at once.
    from hart_jax.data.staging import stage_at_most
    from hart_jax.io.buckets import check_bucket
    from hart_jax.io.local_side import scratch_folder
    from hart_jax.io.ownership import owned
    from hart_jax.parallel.launch import join_processes
    from hart_jax.parallel.mesh import MeshLayout
    from hart_jax.training.hart_task import HartTask
    from hart_jax.training.loop import Task, run
    from hart_jax.training.tokenizer_task import TokenizerTask

    join_processes()
    check_bucket(workdir, "--workdir", write=True)
    for name, folder in shards:
        check_bucket(folder, name)
    stage_at_most(experiment.data.stage_gib)
    with owned(workdir, "a training run"):
        layout = MeshLayout.of(experiment.mesh, experiment.train.batch_size, experiment.train.accumulate)
        task: Task
        if isinstance(experiment, HartExperiment):
            task = HartTask(experiment, scratch_folder(workdir), layout)
        else:
            task = TokenizerTask(experiment, layout)
        run(task, layout, experiment.train, experiment.to_dict(), workdir)


if __name__ == "__main__":
    run_cli(main)
