# Amalgam in a container, also as a Docker Space (sdk: docker, app_port: 7860).
#   docker build -t amalgam . && docker run --rm -p 7860:7860 amalgam
FROM python:3.12-slim

# Spaces run as uid 1000; models and settings live in that user's home.
RUN useradd --create-home --uid 1000 user && install --directory --owner=user /home/user/app
USER user
WORKDIR /home/user/app
ENV PATH=/home/user/.local/bin:$PATH \
    HF_HOME=/home/user/.cache/huggingface \
    AMALGAM_DATA=/home/user/data \
    GRADIO_SERVER_NAME=0.0.0.0 \
    PYTHONUNBUFFERED=1

# The requirements change rarely: in a layer of their own they are installed once.
COPY --chown=user requirements.txt .
RUN pip install --no-cache-dir --user --requirement requirements.txt

COPY --chown=user . .
EXPOSE 7860
CMD ["python", "app.py", "--port", "7860", "--no-browser"]
