# Two images from one file: `service` (API, janitor, CPU worker: no torch) and `trainer` (GPU worker).
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/app/constraints.txt
WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
RUN useradd --create-home --uid 10001 vlmdft && mkdir /data && chown vlmdft /data
VOLUME /data

FROM base AS service
COPY vlm_dft vlm_dft
COPY service service
COPY worker worker
COPY cli cli
COPY benchmarks benchmarks
RUN pip install '.[worker]' && ! python -c 'import torch' 2>/dev/null
USER vlmdft

FROM base AS trainer
# The slow layer first: it changes only with the pins.
RUN pip install torch torchvision transformers accelerate peft
COPY vlm_dft vlm_dft
COPY service service
COPY worker worker
COPY cli cli
COPY benchmarks benchmarks
RUN pip install '.[worker,train,eval]'
USER vlmdft
