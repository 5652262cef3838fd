"""vlm_dft: fine-tune Qwen2.5-VL and text LLMs with SFT or DFT. A model, a file, a directory; no queue, database or web.

Start with ``python -m vlm_dft RUN_DIR``: see ``__main__`` and ``run_dir``.
"""

__version__ = "0.1.0"
