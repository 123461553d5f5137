# `gpt2 serve` in a container, as a user without rights, on a root that may be read-only: see docs/serving.md.
#
#     docker build -t gpt2 .
#     docker build -t gpt2:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#
# TORCH_INDEX is where torch comes from, and PIP_INDEX_URL, if you set it, where everything else does.
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_INDEX_URL
WORKDIR /source
RUN python -m venv /opt/gpt2
ENV PATH=/opt/gpt2/bin:$PATH
COPY constraints.txt ./
# Alone and first: it is large, and what it depends on comes from the other index.
RUN --mount=type=cache,target=/pip \
    pip install --cache-dir /pip --no-deps -c constraints.txt --index-url "$TORCH_INDEX" torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN --mount=type=cache,target=/pip \
    pip install --cache-dir /pip -c constraints.txt '.[serve]'

FROM ${PYTHON}
# The CPU kernel is compiled on the machine that runs it, at the first start. Without g++ all works, and is slower.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 gpt2 \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home gpt2 \
    && install -d -m 1777 /cache
COPY --from=build /opt/gpt2 /opt/gpt2
# Compiled code and downloads are kept in the volume, whoever runs this (`docker run --user`). Of tokens: no secret.
# hadolint ignore=DL3064
ENV PATH=/opt/gpt2/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GPT2_HOME=/cache/gpt2 \
    HF_HOME=/cache/huggingface \
    TIKTOKEN_CACHE_DIR=/cache/tiktoken
VOLUME /cache
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=6s --start-period=2m --retries=3 \
    CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000, timeout=5); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["gpt2", "serve", "--host", "0.0.0.0"]
