# Everything on a CPU:
#     docker build -t fairseq-moe .
#     docker run --rm -v "$PWD:/work" fairseq-moe fairseq-moe --help
# On GPUs: build with --build-arg TORCH_INDEX="" for PyPI's torch with CUDA, run with --gpus all.
FROM python:3.11-slim

# fairseq builds extensions in C++ when it is installed.
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# The version that the second installation asks for: another one it would replace by PyPI's, with CUDA.
ARG TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
COPY constraints.txt /src/
RUN grep ^torch== /src/constraints.txt > /tmp/torch.txt \
    && pip install --no-cache-dir -c /tmp/torch.txt torch ${TORCH_INDEX}

COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt /src \
    && pip install --no-cache-dir --no-deps fairseq==0.12.2

WORKDIR /work
CMD ["fairseq-moe", "--help"]
