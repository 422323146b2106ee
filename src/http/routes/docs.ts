import { readFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import type { FastifyPluginAsync } from 'fastify'

// Only the files of @fastify/swagger-ui are used: registered as a plugin it would add some 30 ms to every start.
const assets = createRequire(import.meta.url).resolve('@fastify/swagger-ui/static/swagger-ui.css').replace(/[^/]+$/, '')

const PAGE = `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Identify relay</title>
<link rel="icon" href="/docs/favicon-32x32.png">
<link rel="stylesheet" href="/docs/swagger-ui.css">
<div id="page"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</html>
`

const FILES = {
  'swagger-ui.css': 'text/css',
  'swagger-ui-bundle.js': 'text/javascript',
  'favicon-32x32.png': 'image/png'
}

/** The OpenAPI document, and a page to read and try it. */
export const docs: FastifyPluginAsync<{ document: () => Promise<object> }> = async (app, { document }) => {
  app.get('/openapi.json', { schema: { hide: true } }, document)

  app.get('/docs', { schema: { hide: true } }, async (request, reply) => reply.type('text/html')
    // Swagger UI styles by attribute and draws its icons from data: URLs.
    .header('content-security-policy', "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:")
    .header('x-content-type-options', 'nosniff')
    .send(PAGE))

  app.get('/docs/start.js', { schema: { hide: true } }, async (request, reply) => reply.type('text/javascript')
    .send("SwaggerUIBundle({ url: '/openapi.json', dom_id: '#page' })\n"))

  for (const [file, type] of Object.entries(FILES)) {
    app.get(`/docs/${file}`, { schema: { hide: true } }, async (request, reply) => reply.type(type)
      .header('cache-control', 'max-age=3600')
      .send(await readFile(assets + file)))
  }
}
