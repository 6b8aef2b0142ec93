# A GPU cluster's image: docker build -t moetrain . ; docker run --gpus all --network host --shm-size 64g moetrain doctor
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-dev python3-venv gcc iproute2 \
 && rm -rf /var/lib/apt/lists/*

# corpora and runs of containers without a mounted folder
WORKDIR /work
ENV PATH=/opt/moetrain/bin:$PATH PYTHONUNBUFFERED=1

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY moetrain /src/moetrain
COPY configs /src/configs
# torch's CUDA build asks for a Triton of its own
RUN sed -i '/^triton==/d' /src/constraints.txt
RUN python3 -m venv /opt/moetrain
RUN /opt/moetrain/bin/pip install --no-cache-dir -c /src/constraints.txt '/src[deepspeed,hf,tensorboard]'

ENTRYPOINT ["moetrain"]
CMD ["doctor"]
