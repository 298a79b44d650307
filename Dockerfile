# docker build -t bids_varaug:0.1.0 .     docs/how-to/containers.md has the rest: podman, Apptainer, CUDA.
# tests/container/build_and_run.sh builds this file and tries the image, without a docker engine.
ARG BASE=debian:bookworm-slim

# What the image and the stages that build it share: Python 3.11, in an environment without pip.
FROM ${BASE} AS python
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/apt /var/log/*.log \
    && python3 -m venv --without-pip /opt/venv

FROM python AS dependencies
RUN apt-get update && apt-get install -y --no-install-recommends python3-pip
ENV PIP_CONSTRAINT=/src/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_PYTHON=/opt/venv/bin/python \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt ./
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Without its headers and its own test programs, 200 MB.
RUN pip install --no-compile --no-deps --extra-index-url "${TORCH_INDEX}" torch \
    && cd /opt/venv/lib/python3*/site-packages/torch \
    && rm -rf include share test bin/test_* bin/protoc*
COPY pyproject.toml ./
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install --no-compile -r requirements.txt \
    && find /opt/venv/lib -path '*/site-packages/*/tests' -type d -prune -exec rm -rf {} +
# Bytecode of what a run imports: nobody else could write it. Of everything it were 185 MB.
RUN NO_ET=1 MPLCONFIGDIR=/tmp NUMBA_CACHE_DIR=/tmp /opt/venv/bin/python -c "import importlib.metadata, \
bids.layout, jinja2, matplotlib.backends.backend_svg, matplotlib.pyplot, mpl_toolkits.axes_grid1, \
nibabel.processing, nipype.pipeline.engine, nipype.pipeline.plugins, numba, pandas, PIL.features, \
safetensors.numpy, safetensors.torch, scipy.ndimage, scipy.stats, significantdigits, skops.io, \
sklearn.compose, sklearn.ensemble, sklearn.gaussian_process, sklearn.linear_model, \
sklearn.model_selection, sklearn.pipeline, sklearn.svm, sqlite3, torch.utils.data, tqdm, yaml"

FROM dependencies AS package
COPY README.md LICENSE NOTICE ./
COPY bids_varaug ./bids_varaug
RUN pip install --no-compile --no-deps --prefix=/package . \
    && python3 -m compileall -q /package \
    # BIDS Apps tell their version in /version.
    && PYTHONPATH=$(echo /package/lib/python3*/site-packages) python3 -c \
        "import importlib.metadata as m; print(m.version('bids_varaug'))" > /version

FROM python
# The large layer changes with the dependencies only.
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=package /package /opt/venv
COPY --from=package /version /version

ARG VERSION=0.1.0
ARG REVISION=""
LABEL org.opencontainers.image.title="bids_varaug" \
      org.opencontainers.image.description="Numerical ensembles for T1w MRI segmentation, as a BIDS App" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"

# No telemetry, nothing from the user's ~/.local and ~/.nipype, which Apptainer shows. Any user id may
# run the image, with a read-only root and no home: caches lie in the work directory.
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8 \
    NO_ET=1 \
    PYTHONNOUSERSITE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLBACKEND=Agg \
    NIPYPE_CONFIG_DIR=/nonexistent \
    BIDS_VARAUG_DOCKER_TAG=bids_varaug:${VERSION}

# The default -w lies below it.
WORKDIR /tmp
ENTRYPOINT ["/opt/venv/bin/bids_varaug"]
