FROM node:24-bookworm-slim AS dependencies
WORKDIR /app
COPY package.json package-lock.json .npmrc ./
RUN npm ci --omit=dev
# What Node never loads from a package: types, source maps and manuals. Licenses stay. The images have glibc.
RUN find node_modules -type f -regextype posix-extended -regex '.*\.([cm]?ts|map|md|markdown)' \
      ! -iname 'licen[cs]e*' ! -iname 'notice*' -delete \
 && rm -rf node_modules/@libsql/*-musl && find node_modules -type d -empty -delete
# With --omit=dev npm would leave out packages that a development dependency needs as well.
RUN cp package.json /tmp && npm pkg delete devDependencies && npm sbom --sbom-format=spdx > sbom.spdx.json \
 && mv /tmp/package.json .
RUN install -d -o 1000 -g 1000 -m 700 /state/var/lib/identify-relay

FROM dependencies AS build
RUN npm ci
COPY tsconfig.json ./
COPY src src
RUN npm run build -- --sourceMap false && npm run bundle

# The balancer and the monitoring of docker-compose.yml. A build of the relay skips them.
FROM debian:bookworm-slim AS balancer
RUN apt-get update && apt-get install -y --no-install-recommends haproxy && rm -rf /var/lib/apt/lists/*
STOPSIGNAL SIGUSR1
USER haproxy
CMD ["haproxy", "-db", "-q", "-f", "/etc/haproxy/haproxy.cfg"]

FROM debian:bookworm-slim AS prometheus
RUN apt-get update && apt-get install -y --no-install-recommends prometheus && rm -rf /var/lib/apt/lists/* \
 && install -d -o prometheus /prometheus
USER prometheus
CMD ["prometheus", "--config.file=/etc/prometheus/relay/prometheus.yml", "--storage.tsdb.path=/prometheus"]

# Node, its libraries and the CA certificates: no shell, no npm.
FROM gcr.io/distroless/nodejs24-debian12
ENV PATH=/nodejs/bin:$PATH NODE_ENV=production PORT=8080
# On loopback nobody outside the container could reach it; any other HOST needs API_KEYS, JWT_* or ALLOW_ANONYMOUS=true.
ENV HOST=0.0.0.0
WORKDIR /app
COPY --from=dependencies /app/sbom.spdx.json ./
COPY --from=dependencies /app/node_modules node_modules
COPY --from=build /app/dist dist
# The relay in few files: a start that loads 500 takes 1.6 times the CPU. The sandbox stays as it is built.
COPY --from=build /app/bundle dist
COPY package.json LICENSE ./
# A new volume that is mounted here is user 1000's as well: OUTBOX=file:/var/lib/identify-relay
COPY --from=dependencies /state /
USER 1000:1000
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --start-interval=1s CMD ["node", "dist/server.js", "healthcheck"]
ENTRYPOINT []
# By its memory limit Node would make the young generation too small for the load: docs/deployment.md#memory
CMD ["node", "--max-semi-space-size=16", "dist/server.js"]
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="Mixpanel identify relay" \
      org.opencontainers.image.description="Validates two ids, sends Mixpanel the event that merges them, and answers with its verdict" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION"
