import { readFileSync } from 'node:fs'
import { Validator } from '@seriousme/openapi-schema-validator'
import { t } from 'tap'
import { parse } from 'yaml'
import { startRelay } from './helper.ts'
import { openapi } from '../src/http/openapi.ts'
import { PROBLEMS } from '../src/http/problem.ts'

t.test('openapi.yaml is what the routes say, is served, and is valid', async t => {
  const { inject, config } = await startRelay(t)
  const file = readFileSync('openapi.yaml', 'utf8')
  t.equal(file.trimEnd(), (await openapi(config)).yaml, 'npm run openapi brings it up to date')
  t.same((await inject({ url: '/openapi.json' })).json(), parse(file))
  const { valid, errors } = await new Validator().validate(parse(file))
  t.equal(valid, true, JSON.stringify(errors))
})

t.test('it names every route, every status and every code', async t => {
  const { app } = await startRelay(t)
  const document = parse(readFileSync('openapi.yaml', 'utf8'))
  t.same(Object.keys(document.paths).sort(), ['/healthz', '/identify', '/identify/batch', '/livez', '/readyz'])
  for (const path of Object.keys(document.paths)) {
    for (const method of Object.keys(document.paths[path])) t.ok(app.hasRoute({ method: method.toUpperCase() as 'GET', url: path }))
  }
  const { responses } = document.paths['/identify'].post
  for (const [code, { status }] of Object.entries(PROBLEMS)) {
    t.match(responses[status].content['application/problem+json'].examples[code].value, { code, status, detail: String })
  }
})

t.test('its example is accepted', async t => {
  const { post } = await startRelay(t)
  const { properties } = parse(readFileSync('openapi.yaml', 'utf8')).paths['/identify'].post.requestBody.content['application/json'].schema
  t.equal((await post({ identified_id: properties.identified_id.examples[0], anon_id: properties.anon_id.examples[0] })).statusCode, 200)
})
