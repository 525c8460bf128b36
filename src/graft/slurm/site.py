"""What differs by cluster: slurm/site.env, read by slurm/site.sh, as the jobs themselves do."""

from __future__ import annotations

import subprocess
from pathlib import Path

from graft.core.errors import ConfigError

JOB = "slurm/job.sh"


def project() -> Path:
    """The folder that holds slurm/ and launch/: the current one, or that of graft's own source tree; ConfigError where neither does."""
    places = (Path.cwd(), Path(__file__).resolve().parents[3])
    found = next((place for place in places if (place / JOB).is_file()), None)
    if found is None:
        raise ConfigError(f"no {JOB} in {places[0]}: run this in graft's project, whose slurm/ holds the jobs")
    return found


def site(folder: Path) -> dict[str, str]:
    """The keys that the project's site.env sets; ConfigError with site.sh's line where it is wrong."""
    done = subprocess.run(["bash", "slurm/site.sh"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(done.stderr.strip().removeprefix("graft: ") or f"{folder}/slurm/site.sh left with {done.returncode}")
    return dict(line.split("=", 1) for line in done.stdout.splitlines())
