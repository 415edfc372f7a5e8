"""An export that is told to stop."""

import os
import signal
import subprocess
import sys


def test_a_terminated_export_leaves_nothing_behind(llama, tmp_path):
    from models import checkpoint

    checkpoint.save(llama, tmp_path / "checkpoint")
    command = [sys.executable, "-u", "-m", "export", str(tmp_path / "checkpoint"), str(tmp_path / "bundles")]
    process = subprocess.Popen([*command, "--name", "llama"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("tracing" in line for line in process.stdout)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 130
    assert "interrupted" in process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    assert list((tmp_path / "bundles" / "llama").iterdir()) == []
