import { Type } from '@sinclair/typebox'
import type { Config } from '../config.ts'
import { INVISIBLE, isJunkId, isTooLong, MAX_ID_BYTES, NO_CONTROL_CHARACTERS, withoutPrefix } from './ids.ts'

type Settings = Pick<Config, 'MIXPANEL_ID_MERGE' | 'ANON_ID_FORMAT'>

const UUID_V4 = '[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-4[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}'

/** Until version 2.62.0 the JavaScript SDK made ids of five groups. This is the pattern of Mixpanel's PHP library. */
const FIVE_GROUPS = '[a-zA-Z0-9]+(?:-[a-zA-Z0-9]+){4}'
const FIVE_GROUPS_ID = new RegExp(`^${FIVE_GROUPS}$`)
const UUID_V4_ID = new RegExp(`^${UUID_V4}$`)

const EXAMPLES = ['$device:5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11']

/** Returns the schema of `anon_id`. `checkAnonId` has the rules that JSON Schema cannot express. */
export function anonIdSchema ({ MIXPANEL_ID_MERGE: mode, ANON_ID_FORMAT: format }: Settings) {
  const description = 'The id under which the user was tracked before'
  if (mode === 'simplified') {
    return Type.String({
      minLength: 1,
      allOf: [
        NO_CONTROL_CHARACTERS,
        {
          pattern: `^(?!\\$device:[${INVISIBLE}])(?:[^${INVISIBLE}](?:[\\s\\S]*[^${INVISIBLE}])?)?$`,
          description: 'must not begin or end with white space or an invisible character'
        },
        {
          pattern: '^(?:\\$device:)?(?!\\$[dD][eE][vV][iI][cC][eE]:)',
          description: 'must not have a prefix other than one $device:'
        }
      ],
      description: `${description}: the $device_id of the event, without its $device: prefix; case matters.`,
      examples: EXAMPLES
    })
  }
  return Type.String({
    allOf: [
      format === 'sdk'
        ? { pattern: `^(?:\\$device:)?${FIVE_GROUPS}$`, description: 'must be a UUID v4 or an id of a Mixpanel SDK' }
        : {
            pattern: `^(?:\\$device:)?${UUID_V4}$`,
            description: 'must be a UUID v4, with or without the $device: prefix'
          },
      { pattern: '^(?!.*0{8}-0{4}-40{3}-[89abAB]0{3}-0{12}$)', description: 'must not be a UUID of zeros' }
    ],
    description: format === 'sdk'
      ? `${description}: a UUID v4, or an id of an older Mixpanel SDK. Passed on byte for byte.`
      : `${description}: a UUID v4, passed on byte for byte.`,
    examples: EXAMPLES
  })
}

const takesOnlyUuids = ({ MIXPANEL_ID_MERGE: mode, ANON_ID_FORMAT: format }: Settings) =>
  mode === 'original' && format === 'uuid-v4'

/** Returns what helps the sender of an `anon_id` that the schema refuses; undefined if nothing does. */
export function explainAnonId (anon: string, settings: Settings): string | undefined {
  const id = withoutPrefix(anon)
  const isOfOlderSdk = takesOnlyUuids(settings) && !UUID_V4_ID.test(id) && FIVE_GROUPS_ID.test(id)
  return isOfOlderSdk ? 'ids of older Mixpanel SDKs need ANON_ID_FORMAT=sdk' : undefined
}

/** Returns the broken rules of an `anon_id` that JSON Schema cannot express. */
export function checkAnonId (anon: string, settings: Settings): string[] {
  if (takesOnlyUuids(settings)) return []
  const id = withoutPrefix(anon)
  const errors: string[] = []
  if (isTooLong(id)) errors.push(`must not have more than ${MAX_ID_BYTES} bytes of UTF-8`)
  // A UUID of zeros with a version has an error of the schema.
  if (anon !== '' && isJunkId(id)) errors.push('must be an id, not a placeholder that many users would share')
  return errors
}
