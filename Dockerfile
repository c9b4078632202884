# The package in NVIDIA's PyTorch image, on that image's own torch and Transformer Engine: `make gpu-container`.
#
# Not built or run by the authors, who had neither a GPU nor that registry. 26.05 is said to bring Python 3.12 and a
# torch 2.12 of NVIDIA's own; any tag whose torch is 2.11 or newer should do (--build-arg TAG=..-py3).
ARG TAG=26.05-py3
FROM nvcr.io/nvidia/pytorch:${TAG}

WORKDIR /opt/megatron-sfr
COPY . .

# The image sets PIP_CONSTRAINT for packages of its own; here only what was built against its CUDA stays as it is.
# The last line fails the build if pip replaced one of those.
RUN pip list --format=freeze \
        | grep -iE '^(torch|torchvision|triton|pytorch[-_]triton|transformer[-_]engine[^=]*|apex|flash[-_]attn)==' \
        | sort > /opt/image-packages.txt \
    && grep -q '^torch==' /opt/image-packages.txt \
    && PIP_CONSTRAINT= pip install --no-cache-dir -c /opt/image-packages.txt -e '.[demo]' pytest pytest-timeout \
        pytest-xdist hypothesis \
    && pip list --format=freeze | sort > /opt/all-packages.txt \
    && test -z "$(comm -23 /opt/image-packages.txt /opt/all-packages.txt)"

ENV CUDA_DEVICE_MAX_CONNECTIONS=1
CMD ["megatron-sfr", "doctor"]
