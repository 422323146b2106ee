import { readFileSync } from 'node:fs'
import type { FastifyInstance, FastifyReply } from 'fastify'
import { FAULTS, LATE_FAULTS } from './faults.ts'

/** The page runs its own script alone, and text cannot become markup. */
const HEADERS = {
  'content-security-policy': [
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    "require-trusted-types-for 'script'", "trusted-types 'none'"
  ].join('; '),
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'cross-origin-opener-policy': 'same-origin',
  'cross-origin-resource-policy': 'same-origin',
  'cache-control': 'no-store'
}

const TYPES = {
  'page.css': 'text/css; charset=utf-8',
  'page.js': 'text/javascript; charset=utf-8',
  'picture.js': 'text/javascript; charset=utf-8',
  'icon.svg': 'image/svg+xml'
}

const WELCOME = { error: 'Welcome. Get started with our API by visiting https://developer.mixpanel.com/' }

/** Sets the headers of an answer that only the sandbox's own page may use. */
export async function setPageHeaders (request: unknown, reply: FastifyReply): Promise<void> {
  reply.headers(HEADERS)
}

/** Serves the page on `/` to browsers, and its files. All others get Mixpanel's answer. */
export function servePage (app: FastifyInstance): void {
  const options = [...Object.keys(FAULTS), ...LATE_FAULTS].map(name => `<option>${name}</option>`)
  const html = fileOf('index.html').toString().replace('<!-- options -->', options.join(''))
  app.get('/', async ({ headers }, reply) => {
    reply.header('vary', 'accept')
    if (headers.accept?.includes('text/html') !== true) return WELCOME
    return reply.headers(HEADERS).type('text/html; charset=utf-8').send(html)
  })
  for (const [name, type] of Object.entries(TYPES)) {
    const file = fileOf(name)
    app.get(`/__sandbox/page/${name}`, { onRequest: setPageHeaders }, async (request, reply) =>
      reply.type(type).send(file))
  }
}

/** The files are in src/sandbox/page; `npm run build` copies them to dist. */
const fileOf = (name: string) => readFileSync(new URL(`page/${name}`, import.meta.url))
