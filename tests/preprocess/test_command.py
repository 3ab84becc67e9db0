"""The command line of preprocessing: quick help, no torch, rejections that name their file."""

from __future__ import annotations

import resource
import subprocess
import sys

from amaes.preprocess.nifti import RejectedInput
from tests.preprocess.test_write_store import ROOT, command


def test_help_is_quick_and_names_the_defaults():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # seconds, whatever else runs
    assert done.returncode == 0
    assert "voxel size, mm (default: 1.0 1.0 1.0)" in " ".join(done.stdout.split())


def test_preprocessing_does_not_load_torch():
    script = "import sys, amaes.preprocess.__main__, amaes.preprocess.write_store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_rejection_carries_code_and_path(bad_files):
    path = bad_files["empty_file"]
    error = RejectedInput("empty_file", path, "expected a NIfTI file")
    assert (error.code, error.path, str(error)) == ("empty_file", path, "empty_file.nii.gz: expected a NIfTI file")
