"""Reports are drawn on machines without torch."""

import pkgutil
import subprocess
import sys

import reports


def test_no_module_of_reports_imports_torch():
    names = [f"reports.{module.name}" for module in pkgutil.iter_modules(reports.__path__)]
    assert "reports.card" in names
    script = (
        "import importlib, sys; [importlib.import_module(n) for n in sys.argv[1:]]; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
