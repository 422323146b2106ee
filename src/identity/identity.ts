import { Type, type Static } from '@sinclair/typebox'
import type { Config } from '../config.ts'
import { anonIdSchema, checkAnonId, explainAnonId } from './anon-id.ts'
import { INVISIBLE, NO_CONTROL_CHARACTERS, isJunkId, isSameDevice, isTooLong, MAX_ID_BYTES } from './ids.ts'

/** An invalid field of a request: `pointer` is a JSON Pointer into the body, `detail` states the rule. */
export interface FieldError { pointer: string, detail: string }

/** Property names that Mixpanel or the relay uses; `mp_*` is reserved as well. */
const RESERVED_NAMES = [
  'token', 'ip', 'time', '$time', 'distinct_id', '$distinct_id', '$device_id', '$user_id', '$insert_id', 'alias',
  '$identified_id', '$anon_id', '$anon_distinct_id', '$distinct_ids', '$event_name', 'bucket', '$bucket', '$ignore',
  '$failure_reason', '$failure_description', '$identity_failure_reason', '$distinct_id_before_identity',
  '$is_reshuffled', '$preshuffle_distinct_id', '$had_persisted_distinct_id'
]

/** Mixpanel's limits: `properties` is level 1, and an array or a nested object has fewer than 255 entries. */
const MAX_DEPTH = 3
const MAX_ENTRIES = 254
const MAX_PROPERTIES = 200

/** The most bytes of an identity as JSON. */
export const MAX_IDENTITY_BYTES = 65_536

type Settings = Pick<Config, 'MIXPANEL_ID_MERGE' | 'ANON_ID_FORMAT'>

/** Far more fields than an identity has. */
const MAX_FIELDS = 100

const Properties = Type.Unsafe<Record<string, unknown>>({
  type: 'object',
  additionalProperties: true,
  maxProperties: MAX_PROPERTIES,
  propertyNames: {
    allOf: [
      { not: { enum: RESERVED_NAMES }, description: 'is a reserved name' },
      { pattern: '^(?!mp_)', description: 'is a reserved name (mp_*)' }
    ]
  },
  description: `Additional event properties: at most ${MAX_PROPERTIES}, names of at most ${MAX_ID_BYTES} bytes, ` +
    `no reserved names, depth at most ${MAX_DEPTH}.`
})

const identitySchema = (settings: Settings) => Type.Object({
  identified_id: Type.String({
    minLength: 1,
    maxLength: MAX_ID_BYTES,
    allOf: [
      NO_CONTROL_CHARACTERS,
      {
        pattern: `^(?:[^${INVISIBLE}](?:[\\s\\S]*[^${INVISIBLE}])?)?$`,
        description: 'must not begin or end with white space or an invisible character'
      },
      { pattern: '^(?!\\$[dD][eE][vV][iI][cC][eE]:)', description: 'must not be an anonymous id ($device:…)' }
    ],
    description: `The id you chose for the user: at most ${MAX_ID_BYTES} bytes of UTF-8, no placeholder such as ` +
      '"null" or "anonymous", not equal to anon_id.',
    examples: ['user-42']
  }),
  anon_id: anonIdSchema(settings),
  distinct_id: Type.Optional(Type.String({ description: 'When given, equal to identified_id.' })),
  properties: Type.Optional(Properties)
}, { additionalProperties: false, title: 'Identity', description: 'An anonymous id and the id of its user.' })

export type Identity = Static<ReturnType<typeof identitySchema>>

export type IdentityRules = ReturnType<typeof createIdentityRules>

/** Returns the rules of an identity, which depend on the mode of the project and on the format of anonymous ids. */
export function createIdentityRules (settings: Settings) {
  return {
    /**
     * The only schema of an identity, for both routes and for the OpenAPI document. The `description` of a pattern
     * becomes the error detail when the pattern does not match.
     */
    schema: identitySchema(settings),
    /**
     * Returns an error for each broken rule that JSON Schema cannot express: junk ids, equality between fields, depth
     * and content of property values. Accepts any value, skips fields of the wrong type, and never throws.
     */
    check: (body: unknown) => checkRules(body, settings),
    /** Returns hints about an identity that breaks a rule; none for a valid one. Accepts any value. */
    explain (body: unknown): FieldError[] {
      const { anon_id: anon }: Partial<Identity> = Object(body)
      const detail = typeof anon === 'string' ? explainAnonId(anon, settings) : undefined
      return detail === undefined ? [] : [{ pointer: '/anon_id', detail }]
    }
  }
}

/**
 * Returns an error if a value has more than `maxFields` fields or 200 properties. The caller gets only that error:
 * reporting each of 100,000 names would block the event loop for a second. Accepts any value, and is fast.
 */
export function checkSize (body: unknown, maxFields = MAX_FIELDS): FieldError[] {
  if (body === undefined) return [{ pointer: '', detail: 'must not be empty' }]
  if (typeof body !== 'object' || body === null) return []
  if (Object.keys(body).length > maxFields) {
    return [{ pointer: '', detail: `must not have more than ${maxFields} fields` }]
  }
  const { properties }: Partial<Identity> = body
  if (typeof properties !== 'object' || Object.keys(properties ?? {}).length <= MAX_PROPERTIES) return []
  return [{ pointer: '/properties', detail: `must not have more than ${MAX_PROPERTIES} properties` }]
}

function checkRules (body: unknown, settings: Settings): FieldError[] {
  if (typeof body !== 'object' || body === null) return []
  const { identified_id: identified, anon_id: anon, distinct_id: distinct, properties }: Partial<Identity> = body
  const errors: FieldError[] = []
  if (typeof identified === 'string') {
    if (identified !== '' && isJunkId(identified)) {
      errors.push({ pointer: '/identified_id', detail: 'must be an id, not a placeholder that many users would share' })
    }
    if (typeof anon === 'string' && isSameDevice(identified, anon)) {
      errors.push({ pointer: '/identified_id', detail: 'must not be equal to anon_id' })
    }
    // The schema reports more characters than that.
    if (isTooLong(identified) && Array.from(identified).length <= MAX_ID_BYTES) {
      errors.push({ pointer: '/identified_id', detail: `must not have more than ${MAX_ID_BYTES} bytes of UTF-8` })
    }
    if (typeof distinct === 'string' && distinct !== identified) {
      errors.push({ pointer: '/distinct_id', detail: 'must be equal to identified_id' })
    }
  }
  if (typeof anon === 'string') {
    for (const detail of checkAnonId(anon, settings)) errors.push({ pointer: '/anon_id', detail })
  }
  if (typeof properties !== 'object' || properties === null) return errors
  for (const [name, value] of Object.entries(properties)) {
    const detail = checkName(name, value) ?? checkValue(value, 2)
    if (detail !== undefined) errors.push({ pointer: `/properties/${escapePointer(name)}`, detail })
  }
  return errors
}

/** Returns the rule that a property's value at `depth` breaks, or undefined; `checkName` likewise for its name. */
function checkValue (value: unknown, depth: number): string | undefined {
  // 1e999 parses as Infinity, which JSON.stringify turns into null.
  if (typeof value === 'number') return Number.isFinite(value) ? undefined : 'must be a finite number'
  if (typeof value === 'string') return value.isWellFormed() ? undefined : 'must not contain lone surrogates'
  if (typeof value !== 'object' || value === null) return undefined
  if (depth > MAX_DEPTH) return `must not be nested deeper than ${MAX_DEPTH} levels`
  const names = Object.keys(value)
  if (names.length > MAX_ENTRIES) return `must not have more than ${MAX_ENTRIES} entries in one object or array`
  for (const name of names) {
    const inner = (value as Record<string, unknown>)[name]
    const detail = checkName(name, inner) ?? checkValue(inner, depth + 1)
    if (detail !== undefined) return detail
  }
  return undefined
}

function checkName (name: string, value: unknown): string | undefined {
  if (!name.isWellFormed()) return 'must not have a name with lone surrogates'
  if (isTooLong(name)) return `must not have a name of more than ${MAX_ID_BYTES} bytes of UTF-8`
  // Harmless here, but code that merges the event into another object would change its prototype.
  const isForbidden = name === '__proto__' ||
    (name === 'constructor' && typeof value === 'object' && value !== null && Object.hasOwn(value, 'prototype'))
  return isForbidden ? 'must not be or contain __proto__ or constructor.prototype' : undefined
}

/** Returns a property name as a JSON Pointer token (RFC 6901 §3). */
export function escapePointer (name: string): string {
  return name.replaceAll('~', '~0').replaceAll('/', '~1')
}
