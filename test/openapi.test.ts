import { readFileSync } from 'node:fs'
import { Validator } from '@seriousme/openapi-schema-validator'
import { t } from 'tap'
import { parse } from 'yaml'
import { startRelay, type Env } from './helper.ts'
import { readConfig } from '#src/config.js'
import { buildApp } from '#src/http/app.js'
import { openapi } from '#src/http/openapi.js'
import { PROBLEMS } from '#src/http/problem.js'
import { createLog } from '#src/log.js'

t.test('openapi.yaml matches the routes, is served, and is valid', async t => {
  const { inject, config } = await startRelay(t)
  const file = readFileSync('openapi.yaml', 'utf8')
  t.equal(file.trimEnd(), (await openapi(config)).yaml, 'openapi.yaml is up to date: run npm run openapi')
  t.same((await inject({ url: '/openapi.json' })).json(), parse(file))
  const { valid, errors } = await new Validator().validate(parse(file))
  t.equal(valid, true, JSON.stringify(errors))
})

t.test('openapi.yaml has every route, every status and every code', async t => {
  const { app } = await startRelay(t)
  const document = parse(readFileSync('openapi.yaml', 'utf8'))
  t.same(Object.keys(document.paths).sort(), ['/healthz', '/identify', '/identify/batch', '/livez', '/readyz'])
  for (const path of Object.keys(document.paths)) {
    for (const method of Object.keys(document.paths[path])) t.ok(app.hasRoute({ method: method.toUpperCase() as 'GET', url: path }), `${method} ${path} is a route`)
  }
  const { responses } = document.paths['/identify'].post
  for (const [code, { status }] of Object.entries(PROBLEMS)) {
    t.match(responses[status].content['application/problem+json'].examples[code].value, { code, status, detail: String })
  }
})

t.test('the example in openapi.yaml is accepted', async t => {
  const { post } = await startRelay(t)
  const document = parse(readFileSync('openapi.yaml', 'utf8'))
  t.equal(document.paths['/identify'].post.requestBody.content['application/json'].schema.$ref, '#/components/schemas/Identity')
  const { identified_id: identifiedId, anon_id: anonId } = document.components.schemas.Identity.properties
  t.equal((await post({ identified_id: identifiedId.examples[0], anon_id: anonId.examples[0] })).statusCode, 200)
})

t.test('/docs loads all of its scripts and styles from the relay', async t => {
  const { inject } = await startRelay(t)
  const page = await inject({ url: '/docs' })
  t.match(page, { statusCode: 200, headers: { 'content-type': /^text\/html/, 'content-security-policy': /default-src 'self'/ } })
  for (const [, path] of page.body.matchAll(/(?:src|href)="([^"]+)"/g)) {
    const asset = await inject({ url: path as string })
    t.equal(asset.statusCode, 200, String(path))
    t.ok(asset.rawPayload.length > 50, `${path} is not empty`)
  }
})

t.test('a document that could not be read is read again, and then once', async t => {
  const config = readConfig({ MIXPANEL_TOKEN: 'x' }, () => '')
  let count = 0
  const app = await buildApp(config, {
    relay: { stop: async () => {}, state: () => ({}) } as never,
    ...createLog('silent', { write () {} }),
    async document () {
      if (count++ === 0) throw new Error('EMFILE')
      return { openapi: '3.1.0' }
    }
  })
  t.teardown(() => app.close())
  const statuses = []
  for (let round = 0; round < 3; round++) statuses.push((await app.inject({ url: '/openapi.json' })).statusCode)
  t.same(statuses, [500, 200, 200], 'only the first request fails')
  t.equal(count, 2, 'after a success it is not read again')
})

t.test('/docs and /openapi.json exist for a loopback HOST, or where DOCS says so', async t => {
  const open = { HOST: '0.0.0.0', ALLOW_ANONYMOUS: 'true' }
  const rows: [env: Env, status: number][] = [[{}, 200], [{ DOCS: 'false' }, 404], [open, 404], [{ ...open, DOCS: 'true' }, 200]]
  for (const [env, status] of rows) {
    const { inject } = await startRelay(t, { env })
    for (const url of ['/docs', '/openapi.json', '/docs/swagger-ui-bundle.js']) {
      const answer = await inject({ url })
      t.equal(answer.statusCode, status, `${url} with ${JSON.stringify(env)} is ${status}`)
      if (status === 404) continue
      const again = await inject({ url, headers: { 'if-none-match': `"x", W/${answer.headers.etag}` } })
      t.match(again, { statusCode: 304, payload: '' }, `${url} with a known ETag is 304`)
      const other = await inject({ url, headers: { 'if-none-match': '"another"' } })
      t.equal(other.payload, answer.payload, `${url} with another ETag is sent`)
    }
  }
})
