"""What a chaos stack starts as its trainer: the step trainer for trainings, the real thing for validations.

The step trainer keeps the same contract in a hundredth of the time, so that faults can come every second.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # a trainer runs with PYTHONSAFEPATH

from step_trainer import main

from vlm_dft.run_dir import RunDir

if __name__ == "__main__":
    path = sys.argv[-1]
    if RunDir(Path(path)).read_config().train is None:
        os.execv(sys.executable, [sys.executable, "-m", "vlm_dft", path])
    main()
