# Bundles as an image that is only mounted, never run (deploy/kubernetes/components/models-image):
#   docker build -f deploy/docker/bundles.Dockerfile -t attendant-bundles:1 build/bundles
FROM scratch
LABEL org.opencontainers.image.title="attendant-bundles"
COPY . /
