# Two images. A server (docs/how-to/serving.md), for CPUs, or with JAX_EXTRA for GPUs or TPUs:
#
#     docker build --target serve --build-arg JAX_EXTRA=gpu --tag clvr-jax:serve .
#     docker run --rm --publish 127.0.0.1:8000:8000 --env CLVR_API_KEY --volume clvr:/data clvr-jax:serve
#
# One process of a training run (docs/how-to/training-on-tpu-pods.md), for TPU hosts (the default) or GPU nodes:
#
#     docker build --build-arg JAX_EXTRA=tpu --tag clvr-jax:tpu .
#     docker run --rm clvr-jax:tpu --help
#
# JAX_EXTRA is one of the extras in pyproject.toml: tpu, gpu. The arguments of the containers are those of `clvr serve`
# and `clvr launch`.
FROM python:3.11-slim AS base
WORKDIR /clvr
COPY . .
RUN useradd --uid 1000 --create-home clvr && chown clvr:clvr /clvr
ENV PYTHONUNBUFFERED=1

FROM base AS serve
ARG JAX_EXTRA=
RUN pip install --no-cache-dir ".[${JAX_EXTRA:+${JAX_EXTRA},}replicas]" && install --directory --owner=clvr /data
USER clvr
# Loops, their index, and compiled programs, with which the next start is faster.
ENV XDG_CACHE_HOME=/data/.cache
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Other machines reach it, so it needs a key in CLVR_API_KEY.
ENTRYPOINT ["clvr", "serve", "--host", "0.0.0.0", "--out", "/data"]

FROM base
ARG JAX_EXTRA=tpu
RUN pip install --no-cache-dir ".[${JAX_EXTRA},train,gcs]"
USER clvr
ENTRYPOINT ["clvr", "launch"]
