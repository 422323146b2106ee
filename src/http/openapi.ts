import swagger from '@fastify/swagger'
import { buildApp } from './app.ts'
import type { Config } from '../config.ts'
import { createLog } from '../log.ts'
import { createMixpanel } from '../mixpanel/client.ts'
import { createRelay } from '../relay/relay.ts'

const about = {
  openapi: '3.1.0',
  info: {
    title: 'Mixpanel identify relay',
    version: '1',
    license: { name: 'MIT', identifier: 'MIT' },
    description: 'Takes two ids, adds the project token, and tells the truth about what Mixpanel said.'
  }
}

const noop = async () => ({})

/**
 * The OpenAPI document of the routes, as an object and as YAML. From an app of its own that serves nobody, so that the
 * one that serves need not load the generator, which would make every start a tenth longer.
 */
export async function openapi (config: Config): Promise<{ document: object, yaml: string }> {
  const client = createMixpanel(config)
  const log = createLog('silent', { write () {} })
  const app = await buildApp(config, {
    relay: createRelay(config, client, log.logger),
    ...log,
    document: noop,
    async prepare (app) {
      await app.register(swagger, {
        openapi: about,
        refResolver: { buildLocalReference: ({ $id }) => String($id) },
        transform: ({ schema, url, route: { config } }) =>
          ({ url, schema: { ...schema, ...config?.body !== undefined && { body: config.body } } })
      })
    }
  })
  await app.ready()
  const result = { document: app.swagger(), yaml: app.swagger({ yaml: true }).trimEnd() }
  await app.close()
  await client.close()
  return result
}
