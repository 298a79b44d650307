# docker build -t bids_varaug:0.1.0 --build-arg VERSION=0.1.0 .
# For CUDA: --build-arg TORCH_INDEX=https://pypi.org/simple, then docker run --gpus all.
FROM python:3.12.8-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG VERSION=0.1.0

LABEL org.opencontainers.image.title="bids_varaug" \
      org.opencontainers.image.description="Numerical ensembles for T1w MRI segmentation, as a BIDS App" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"

# The two large layers change with constraints.txt only.
WORKDIR /opt/bids_varaug
COPY constraints.txt ./
RUN pip install --no-cache-dir --no-deps -c constraints.txt \
        --extra-index-url "${TORCH_INDEX}" torch

COPY pyproject.toml README.md LICENSE NOTICE ./
COPY bids_varaug ./bids_varaug
RUN pip install --no-cache-dir -c constraints.txt . \
    # BIDS Apps tell their version in /version.
    && python -c "import importlib.metadata as m; print(m.version('bids_varaug'))" > /version \
    # Any user id may run the image, with a read-only root and no home of its own.
    && mkdir -p /home/varaug && chmod 1777 /home/varaug

# No telemetry, nothing from the host user's ~/.local; what must be written goes below /tmp.
ENV NO_ET=1 \
    PYTHONNOUSERSITE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/home/varaug \
    MPLBACKEND=Agg \
    MPLCONFIGDIR=/tmp/varaug-matplotlib \
    NUMBA_CACHE_DIR=/tmp/varaug-numba \
    NIPYPE_CONFIG_DIR=/tmp/varaug-nipype \
    BIDS_VARAUG_DOCKER_TAG=bids_varaug:${VERSION}

# Away from the sources, so that what runs is what was installed. The default -w lies below it.
WORKDIR /tmp
ENTRYPOINT ["/usr/local/bin/bids_varaug"]
