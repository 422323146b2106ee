FROM node:24-bookworm-slim AS dependencies
WORKDIR /app
COPY package.json package-lock.json .npmrc ./
RUN npm ci --omit=dev

FROM dependencies AS build
RUN npm ci
COPY tsconfig.json ./
COPY src src
RUN npm run build

FROM node:24-bookworm-slim
# On loopback nobody outside the container could reach it; any other HOST needs API_KEYS, JWT_* or ALLOW_ANONYMOUS=true.
ENV NODE_ENV=production HOST=0.0.0.0 PORT=8080
WORKDIR /app
COPY --from=dependencies /app/node_modules node_modules
COPY --from=build /app/dist dist
COPY package.json LICENSE ./
# A new volume that is mounted here is user 1000's as well: OUTBOX=file:/var/lib/identify-relay
RUN install -d -o 1000 -g 1000 -m 700 /var/lib/identify-relay
USER 1000:1000
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --start-interval=1s CMD ["node", "dist/server.js", "healthcheck"]
CMD ["node", "dist/server.js"]
