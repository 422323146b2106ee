import { createHash } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'

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
const START = "SwaggerUIBundle({ url: '/openapi.json', dom_id: '#page' })\n"

/** Swagger UI has a column that is always empty here, and wider tables than a phone. */
const NARROW = Buffer.from('\n.response-col_links { display: none }\n.responses-wrapper { overflow-x: auto }\n')

interface Page { body: Buffer, etag: string }

/** The OpenAPI document, and a page to read and try it. */
export const docs: FastifyPluginAsync<{ document: () => Promise<object> }> = async (app, { document }) => {
  const asset = (name: string) => () => readFile(assets + name)
  const pages: [path: string, type: string, read: () => Promise<Buffer>][] = [
    ['/openapi.json', 'application/json', async () => Buffer.from(JSON.stringify(await document()))],
    ['/docs', 'text/html', async () => Buffer.from(PAGE)],
    ['/docs/start.js', 'text/javascript', async () => Buffer.from(START)],
    ['/docs/swagger-ui.css', 'text/css', async () => Buffer.concat([await asset('swagger-ui.css')(), NARROW])],
    ['/docs/swagger-ui-bundle.js', 'text/javascript', asset('swagger-ui-bundle.js')],
    ['/docs/favicon-32x32.png', 'image/png', asset('favicon-32x32.png')]
  ]
  for (const [path, type, read] of pages) {
    const page = once(async () => asPage(await read()))
    app.get(path, { schema: { hide: true } }, async (request, reply) => {
      reply.type(type)
      if (path === '/docs') reply.headers({ 'content-security-policy': POLICY, 'referrer-policy': 'no-referrer' })
      return sendPage(request, reply, await page())
    })
  }
}

/** Swagger UI styles by attribute and draws its icons from data: URLs. */
const POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; " +
  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

/** One buffer for all who ask: however many answers wait to be read, the page is in memory once. */
function asPage (body: Buffer): Page {
  return { body, etag: `"${createHash('sha256').update(body).digest('base64url').slice(0, 22)}"` }
}

/** Answers 304 to a caller who has the page (RFC 9110 §13.1.2). */
function sendPage ({ headers }: FastifyRequest, reply: FastifyReply, { body, etag }: Page): FastifyReply {
  const known = headers['if-none-match']?.split(',').map(tag => tag.trim().replace(/^W\//, ''))
  reply.header('etag', etag).header('cache-control', 'no-cache')
  return known?.includes(etag) === true || known?.includes('*') === true ? reply.code(304).send() : reply.send(body)
}

/** Calls `work` when its result is first asked for, and again only where it failed. */
function once<Result> (work: () => Promise<Result>): () => Promise<Result> {
  let result: Promise<Result> | undefined
  return () => (result ??= work().catch(error => {
    result = undefined
    throw error
  }))
}
