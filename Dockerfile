# Three images from one file: `service` (API, janitor, CPU worker: no torch), `trainer` (GPU worker), and `eval`, which is
# `trainer` with VLMEvalKit.
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
RUN pip install '.[worker,s3,otel]' && ! python -c 'import torch' 2>/dev/null
USER vlmdft

FROM base AS trainer
# The slow layer first: it changes only with the pins.
RUN pip install torch torchvision transformers accelerate peft
COPY vlm_dft vlm_dft
COPY service service
COPY worker worker
COPY cli cli
COPY benchmarks benchmarks
RUN pip install '.[worker,train,eval,s3,otel]'
USER vlmdft

FROM trainer AS eval
# VLMEvalKit in a virtual environment of its own, on this image's torch and transformers. The commit is
# vlm_dft.evaluation.vlmevalkit.installation.COMMIT: scores by another one are not comparable.
ARG VLMEVAL_COMMIT=e8e78f05f3080fe28154f2130321f17951c3be94
ENV VLM_DFT_VLMEVAL_PYTHON=/opt/vlmeval/venv/bin/python VLM_DFT_VLMEVAL_ROOT=/opt/vlmeval/source
USER root
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
RUN git init -q /opt/vlmeval/source && cd /opt/vlmeval/source \
    && git fetch -q --depth 1 https://github.com/open-compass/VLMEvalKit "$VLMEVAL_COMMIT" && git checkout -q FETCH_HEAD \
    && git config --system --add safe.directory /opt/vlmeval/source
RUN python -m venv --system-site-packages /opt/vlmeval/venv \
    && /opt/vlmeval/venv/bin/python -m pip install -r vlm_dft/evaluation/vlmevalkit/requirements.txt
USER vlmdft
# An image without a working VLMEvalKit would score natively, with a warning in a log: better none.
RUN python -m vlm_dft.evaluation.vlmevalkit.installation
