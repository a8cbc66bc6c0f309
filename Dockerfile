# One process of a training run, for TPU hosts (the default) or GPU nodes:
#
#     docker build --build-arg JAX_EXTRA=tpu --tag clvr-jax:tpu .
#     docker run --rm clvr-jax:tpu --help
#
# The arguments of the container are those of `clvr launch`; docs/training-on-tpu-pods.md explains them. JAX_EXTRA is one
# of the extras in pyproject.toml: tpu, gpu.
FROM python:3.11-slim
ARG JAX_EXTRA=tpu
WORKDIR /clvr
COPY . .
RUN pip install --no-cache-dir ".[${JAX_EXTRA},train]" && useradd --uid 1000 --create-home clvr && chown clvr:clvr /clvr
USER clvr
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["clvr", "launch"]
