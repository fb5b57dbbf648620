# syntax=docker/dockerfile:1
# A small image with the one program in it; it runs as nobody in particular and writes only to /data.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
# The caches outlive a build and are no part of any image, so the program is copied out of them.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin pumphouse \
    && install -m 0755 target/release/pumphouse /usr/local/bin/pumphouse

FROM debian:bookworm-slim
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 65532 -g 65532 /data
COPY --from=build /usr/local/bin/pumphouse /usr/local/bin/pumphouse
COPY LICENSE-MIT LICENSE-APACHE /usr/share/doc/pumphouse/

USER 65532:65532
WORKDIR /data
VOLUME /data
EXPOSE 8080

# Reaching a container from outside needs an address that is not loopback, and that is refused until
# whoever runs it says PUMPHOUSE_INSECURE=true: see docs/configuration.md.
ENV PUMPHOUSE_LISTEN=0.0.0.0:8080 \
    PUMPHOUSE_DATABASE=sqlite:///data/pumphouse.db

STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["pumphouse", "health"]
ENTRYPOINT ["pumphouse"]
CMD ["serve"]
