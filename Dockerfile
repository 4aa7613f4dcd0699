# Everything but the data and, for a GPU, the driver:
#   docker build -t lever-plus .
#   docker run --rm -v "$PWD/results:/lever-plus/results" lever-plus bash scripts/quickstart.sh
#   docker run --rm --gpus all -v /data:/data -v "$PWD/results:/lever-plus/results" --env-file .env lever-plus \
#       bash scripts/train_v3_rce_only.sh 0 rand_sampler 10
# For a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends git gcc g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /lever-plus
COPY requirements.txt .
RUN torch="$(grep -o '^torch==[0-9.]*' requirements.txt)" \
    && pip install --no-cache-dir --index-url "$TORCH_INDEX" "$torch" \
    && pip install --no-cache-dir -r requirements.txt
COPY . .
CMD ["bash", "scripts/quickstart.sh", "--help"]
