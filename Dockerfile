# One process of a training run, for TPU hosts (the default) or GPU nodes:
#
#     docker build --build-arg JAX_EXTRA=tpu --tag clvr-jax:tpu .
#     docker run --rm clvr-jax:tpu --help
#
# What follows the image's name goes to launch/train.py. JAX_EXTRA is one of the extras in pyproject.toml: tpu, gpu.
FROM python:3.11-slim
ARG JAX_EXTRA=tpu
WORKDIR /clvr
COPY . .
RUN pip install --no-cache-dir ".[${JAX_EXTRA}]" && useradd --uid 1000 --create-home clvr && chown clvr:clvr /clvr
USER clvr
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["python", "launch/train.py"]
