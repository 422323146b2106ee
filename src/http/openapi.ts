import { PassThrough } from 'node:stream'
import swagger from '@fastify/swagger'
import type { Config } from '../config.ts'
import { createLog } from '../log.ts'
import { createMixpanel } from '../mixpanel/client.ts'
import { createRelay } from '../relay/relay.ts'
import { buildApp } from './app.ts'

const about = {
  openapi: '3.1.0',
  info: {
    title: 'Mixpanel identify relay',
    version: '1',
    license: { name: 'MIT', identifier: 'MIT' },
    contact: { name: 'The operator of this relay' },
    description: 'Validates pairs of ids, adds the project token, and sends Mixpanel the events that merge them: ' +
      '`$identify` in projects with Original ID Merge, an ordinary event in those with Simplified ID Merge.'
  },
  // The relay that serves the document, so that its page can try it.
  servers: [{ url: '/', description: 'This relay.' }],
  security: [],
  components: {
    securitySchemes: {
      bearer: {
        type: 'http' as const,
        scheme: 'bearer',
        description: 'An API key (API_KEYS), or the token of a user (JWT_SECRET, JWT_JWKS_URL).'
      },
      apiKey: { type: 'apiKey' as const, in: 'header', name: 'x-api-key', description: 'An API key (API_KEYS).' }
    }
  },
  tags: [
    { name: 'identities', description: 'Tell Mixpanel that an anonymous user is a known one.' },
    { name: 'health', description: 'For orchestrators and load balancers.' }
  ]
}

/**
 * Returns the OpenAPI document of the routes, as an object and as YAML. It comes from an app that does not listen, so
 * the serving process loads the generator only on demand: it would make every start a tenth longer.
 */
export async function openapi (config: Config): Promise<{ document: object, yaml: string }> {
  const client = createMixpanel(config)
  const log = createLog('silent', new PassThrough())
  const app = await buildApp(config, {
    relay: createRelay(config, client, log.logger),
    ...log,
    document: openapi.bind(undefined, config),
    async prepare (app) {
      await app.register(swagger, {
        openapi: about,
        transform: ({ schema, url, route: { config: { body, headers } = {} } }) =>
          ({ url, schema: { ...schema, ...body !== undefined && { body }, ...headers !== undefined && { headers } } }),
        transformObject: document => nameSchemas((document as { openapiObject: object }).openapiObject)
      })
    }
  })
  await app.ready()
  const result = { document: app.swagger(), yaml: app.swagger({ yaml: true }).trimEnd() }
  await app.close()
  await client.close()
  return result
}

/** Moves every schema that has a title to `components`, and refers to it by that name. */
function nameSchemas<Document extends { paths?: object, components?: object }> (document: Document): Document {
  const schemas: Record<string, unknown> = {}

  function visit (value: unknown): unknown {
    if (Array.isArray(value)) return value.map(visit)
    if (typeof value !== 'object' || value === null) return value
    const { title, ...rest } = Object.fromEntries(Object.entries(value)
      .map(([key, inner]) => [key, key === 'examples' || key === 'example' ? inner : visit(inner)]))
    if (typeof title !== 'string') return title === undefined ? rest : { title, ...rest }
    schemas[title] ??= rest
    return { $ref: `#/components/schemas/${title}` }
  }
  const paths = visit(document.paths)
  return { ...document, components: { ...document.components, schemas }, paths }
}
