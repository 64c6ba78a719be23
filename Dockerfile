# The environment of trt-graft on a machine with a GPU. It holds no code: start.sh mounts the repository.
ARG TENSORRT_IMAGE=nvcr.io/nvidia/tensorrt:26.08-py3
FROM ${TENSORRT_IMAGE}

# cmake, ninja and g++ for the plugins, Python's headers for pycuda.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        cmake g++ ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# An environment over the image's packages: TensorRT's bindings are seen, the pins of requirements.txt win, and neither
# the image's pip constraints nor the system's ban on pip stands in the way.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:${PATH} PIP_CONSTRAINT=
RUN python3 -m venv --system-site-packages /opt/venv \
    && python -c 'import importlib.util as i; assert i.find_spec("tensorrt"), "the image lacks TensorRT for Python"'

COPY requirements*.txt /opt/requirements/
RUN sed -i '/^tensorrt-rtx/d' /opt/requirements/requirements.txt \
    && pip install --no-cache-dir \
        -r /opt/requirements/requirements.txt \
        -r /opt/requirements/requirements-dev.txt \
        -r /opt/requirements/requirements-runtime.txt

# NVIDIA's entry point prints a banner on standard output, which is the command's alone.
ENTRYPOINT []
