# FastHPM in a container; the host needs NVIDIA's container toolkit and a driver for CUDA 13.
# `make lint` lints it and tests/test_packaging.py compares it with scripts/setup.sh; it has not been built yet.
#
#     docker build -t fasthpm .
#     docker run --rm --gpus all fasthpm                                   # what it finds: fasthpm doctor
#     docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD:/workspace" fasthpm \
#         fasthpm pretrain --recipe debug --output_dir runs/debug

# torch's wheels bring CUDA's libraries; the base brings what the driver's side of a container expects.
FROM nvidia/cuda:13.0.0-base-ubuntu24.04

# The packages of scripts/setup.sh: FFCV is compiled against OpenCV and libjpeg-turbo, data_prep.videos runs ffmpeg,
# torch.compile and Triton call g++ and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ffmpeg \
        g++ \
        libopencv-dev \
        libturbojpeg0-dev \
        pkg-config \
        python3.12-dev \
        python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1

WORKDIR /opt/fasthpm
COPY . .
# constraints.txt pins; by environment, it also holds where pip builds (two names: pip before and after 25.3).
# hadolint ignore=DL3013
RUN python3.12 -m venv /opt/venv \
    && PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
        pip install --no-cache-dir ".[train,ffcv,webdataset,parquet,video,hf,dense]"

# Any user may run it, such as the owner of the folder mounted at /workspace: compiled kernels go to HOME, and torch asks
# for a user name that such a user may lack.
RUN useradd --uid 10001 --create-home trainer \
    && install --directory --mode=1777 /workspace /home/trainer /home/trainer/.cache
ENV HOME=/home/trainer \
    USER=trainer
USER 10001
WORKDIR /workspace
CMD ["fasthpm", "doctor"]
