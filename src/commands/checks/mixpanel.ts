import { randomUUID } from 'node:crypto'
import type { Config } from '../../config.ts'
import { identifyEvent } from '../../identity/event.ts'
import type { Answer } from '../../mixpanel/answer.ts'
import { createMixpanel, type Mixpanel } from '../../mixpanel/client.ts'
import { failed, ok, PART_MS, warning, type Finding } from './check.ts'

/** Resolves with the result of `ask`, for which a client is open. */
async function withClient<Result> (config: Config, ask: (client: Mixpanel) => Promise<Result>): Promise<Result> {
  const client = createMixpanel(config)
  try {
    return await ask(client)
  } finally {
    await client.close()
  }
}

const wordsOf = ({ code, cause, reason }: Answer) => [code, cause, reason].filter(Boolean).join(', ')

/**
 * Asks `/import` to take an empty record, of which nothing is stored. Only 401 and 403 are failures: other answers are
 * not documented.
 */
export async function checkCredentials (config: Config): Promise<Finding> {
  const answer = await withClient(config, client => client.send(client.encodeNothing(), PART_MS))
  const name = config.MIXPANEL_SERVICE_ACCOUNT === undefined ? 'MIXPANEL_TOKEN' : 'MIXPANEL_SERVICE_ACCOUNT'
  if (answer.code === 'mixpanel_rejected_credentials') {
    return failed(`/import rejected ${name} (${answer.cause})`,
      `check ${name}, MIXPANEL_REGION and the settings of the project`)
  }
  if (answer.code === 'refused_by_mixpanel') {
    return ok(`/import knows ${name}. It answered: ${answer.reason ?? 'no reason'}`)
  }
  if (answer.code === 'accepted') return ok(`/import does not reject ${name}`)
  return warning(`it cannot be told: ${wordsOf(answer)}`, 'try again later')
}

/**
 * Sends `/import` an event that cannot merge anything. Fails when the mode of the project is not the configured one, or
 * cannot be told.
 */
export async function checkMode (config: Config): Promise<Finding> {
  const id = randomUUID()
  const event = identifyEvent({ identified_id: id, anon_id: id }, Date.now())
  const answer = await withClient(config, client =>
    client.send(client.encode([event], { endpoint: 'import' }), PART_MS))
  if (answer.code !== 'accepted' && answer.isForAll !== true) {
    return failed(`it cannot be told: ${wordsOf(answer)}`, 'see the settings of the project (Identity Merge)')
  }
  const mode = answer.code === 'accepted' ? 'original' : 'simplified'
  if (mode !== config.MIXPANEL_ID_MERGE) {
    return failed(`the project needs MIXPANEL_ID_MERGE=${mode}`, 'set it, and restart the relay')
  }
  // A project with legacy ID management takes the event as well.
  return ok(`the project ${mode === 'original' ? 'does not have' : 'has'} Simplified ID Merge`)
}
